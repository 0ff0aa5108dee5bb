"""LIT: Less is More: Pay Less Attention in Vision Transformers, arXiv 2105.14217.

Written from the paper and the facts of the authors' code, https://github.com/ziplab/LIT (Apache-2.0; the weights carry
the same licence). LIT-Ti is another architecture than LIT-S, M and B, see lit_ti. Differs: odd maps are padded where
the authors' token merging drops the last row and column; classifiers take every size by resizing position tables, as
the authors' dense forms do, where theirs take one alone.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .layers import (
    ConvDownsample,
    MetaFormerBlock,
    Mlp,
    build_mixer,
    drop_path_schedule,
    mixer,
    norm_factory,
    resize,
)
from .layers.deform import DeformableMerging
from .layers.grid import grid_of
from .layers.linear import Linear
from .layers.lookup import choose
from .layers.norm import NormFactory
from .pvt_v2 import resolve_heads
from .registry import register, weights
from .sizes import Resampled
from .skeleton import Hierarchical, check_stages, per_stage, rename

# B batch, C channels, H W size of the current stage, N = H * W positions, h heads

Spec = str | Mapping[str, Any] | None
_TABLES_FOR = {'seg': 512, 'det': 800}  # image sizes of the dense forms' tables of relative positions


class MlpBlock(nn.Module):
    """x + drop(mlp(norm(x))): a block that mixes no tokens, unless its MLP does; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, *, dim: int, norm: NormFactory, mlp: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


@mixer('relative_attention')
class RelativeAttention(nn.Module):
    """Attention between all positions with a learned bias for each offset between two of them.

    The table of biases is made for maps of `grid`; for others it is resized, bicubically, at every call.

    Args:
        dim: channels.
        num_heads: attention heads; dim // 32 if None.
        grid: (H, W) that the table is made for; 14 x 14 if None.
    """

    def __init__(self, *, dim: int, num_heads: int | None = None, grid: tuple[int, int] | None = None):
        super().__init__()
        self.num_heads = resolve_heads(dim, num_heads)
        self.grid = grid if grid is not None else (14, 14)
        rows, cols = (2 * n - 1 for n in self.grid)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows * cols, self.num_heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        query, key, value = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, self.bias(H, W).to(query.dtype))
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))

    def bias(self, H: int, W: int) -> Tensor:
        """(h, N, N): what is added to the products of positions i and j, by their offset i - j."""
        table = resize_table(self.relative_position_bias_table, self.grid, (H, W))
        row, col = torch.arange(H, device=table.device), torch.arange(W, device=table.device)
        down = (row[:, None] - row + H - 1) * (2 * W - 1)
        right = col[:, None] - col + W - 1
        index = (down[:, None, :, None] + right[None, :, None, :]).reshape(-1)
        return table.t().index_select(1, index).reshape(self.num_heads, H * W, H * W)

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Resizes a table made for another, square, map."""
        key = prefix + 'relative_position_bias_table'
        if key not in state or state[key].shape == self.relative_position_bias_table.shape:
            return
        side = (round(state[key].shape[0] ** 0.5) + 1) // 2
        if state[key].shape[0] == (2 * side - 1) ** 2:
            state[key] = resize_table(state[key], (side, side), self.grid)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, grid={self.grid}'


def resize_table(table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Biases by offset on maps of `grid`, (offsets, h), as biases for maps of `size`."""
    if resize.same_size(size, grid):
        return table
    (rows, cols), (new_rows, new_cols) = ((2 * n - 1 for n in pair) for pair in (grid, size))
    resized = resize.resize_table(table.unflatten(0, (rows, cols)), (new_rows, new_cols), 'bicubic')
    return resized.flatten(0, 1).to(table.dtype)


class MergingPyramid(Hierarchical):
    """What LIT, LIT-Ti and LITv2 share."""

    def init_weights(self, module: nn.Module) -> None:
        """The authors': truncated normal in linear layers, PyTorch's own in convolutions."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    def drop_first_norm(self) -> None:
        """Leaves the first map as it is, as the authors' detection code does."""
        if '0' in self.output_norms:
            del self.output_norms['0']
        self.absent_keys += ('output_norms.0.',)


def build_stages(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    mixers: Sequence[Spec],
    grids: Sequence[tuple[int, int]],
    norm: NormFactory,
    mlp: Callable[[int], nn.Module],
    drop_path_rate: float,
) -> list[list[nn.Module]]:
    """The blocks of each stage: MLPs alone where the mixer is None.

    Args:
        grids: (H, W) of each stage's map, for mixers that are made for one.
        mlp: makes the MLP of a stage by its number.
    """

    def block(stage: int, rate: float) -> nn.Module:
        dim, spec = dims[stage], mixers[stage]
        if spec is None:
            return MlpBlock(dim=dim, norm=norm, mlp=mlp(stage), drop_path=rate)
        return MetaFormerBlock(
            dim=dim,
            norm=norm,
            mixer=build_mixer(spec, dim=dim, grid=grids[stage]),
            mlp=mlp(stage),
            drop_path=rate,
        )

    schedule = drop_path_schedule(depths, drop_path_rate)
    return [[block(stage, rate) for rate in rates] for stage, rates in enumerate(schedule)]


class LIT(MergingPyramid):
    """MLPs alone in two stages, attention with relative positions before them in the next two.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads: attention heads, one for all stages or one per stage.
        mlp_ratio: width of the MLPs over that of the stage.
        mixers: token mixer of each stage: None for none, 'relative_attention' with the arguments above, or another by
            name or dict(name=..., option=...).
        norm: normalisation of blocks, classifier and output maps, by name.
        dense: the authors' two dense forms: 'seg' normalises all output maps, 'det' all but the first.
        img_size: height and width that tables of relative positions are made for: 224 if None; in dense form 512
            ('seg') or 800 ('det').
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='tables of relative positions are resized bicubically')
    norm_first = True
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 2, 1),
        'dims': (32, 64, 96, 128),
        'num_heads': (1, 2, 3, 4),
        'mlp_ratio': 2.0,
        'img_size': 64,
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: int | Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        mixers: Sequence[Spec] = (None, None, 'relative_attention', 'relative_attention'),
        norm: str = 'layer_eps5',
        dense: str = 'seg',
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        depths, dims = check_stages(depths, dims)
        choose('dense', dense, _TABLES_FOR)
        if img_size is None:
            img_size = _TABLES_FOR[dense] if features_only else 224
        make_norm = norm_factory(norm)
        stem = ConvDownsample(in_chans, dims[0], kernel=4, stride=4, padding=0, post_norm=make_norm, image=True)
        self.assemble(
            dims=dims,
            downsamplings=[stem, *(DeformableMerging(a, b) for a, b in itertools.pairwise(dims))],
            stages=build_stages(
                depths=depths,
                dims=dims,
                mixers=[
                    dict(name=spec, num_heads=heads) if spec == 'relative_attention' else spec
                    for spec, heads in zip(per_stage('mixers', mixers), per_stage('num_heads', num_heads))
                ],
                grids=[grid_of(img_size, stride) for stride in self.strides],
                norm=make_norm,
                mlp=lambda stage: Mlp(dim=dims[stage], ratio=mlp_ratio),
                drop_path_rate=drop_path_rate,
            ),
            output_norm=make_norm,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if features_only and dense == 'det':
            self.drop_first_norm()
        self.apply(self.init_weights)

    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith('.relative_position_bias_table')}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, where downsampling is the end of a stage."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'patch_embed\.proj\.', 'downsample_layers.0.conv.'),
    (r'patch_embed\.norm\.', 'downsample_layers.0.post_norm.'),
    *((rf'layers\.{s}\.downsample\.', f'downsample_layers.{s + 1}.') for s in range(3)),
    (r'layers\.(\d)\.blocks\.(\d+)\.attn\.', r'stages.\1.\2.token_mixer.'),
    (r'layers\.(\d)\.blocks\.', r'stages.\1.'),
    (r'norm(\d)\.', r'output_norms.\1.'),
]

# parameters: as the published code has them; its README says 19, 27, 48 and 86 million
URL = 'https://github.com/ziplab/LIT/releases/download/v1.0/'
PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2105.14217',
    'origin': 'https://github.com/ziplab/LIT',
    'crop_pct': 0.875,
}

register(
    'lit_s',
    LIT,
    depths=(2, 2, 6, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    drop_path=0.2,
    weights=[weights('ziplab_in1k', URL + 'lit_s.pth', top1=81.5, params=28.0, macs=4.1, **PAPER)],
)
register(
    'lit_m',
    LIT,
    depths=(2, 2, 18, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    drop_path=0.3,
    weights=[weights('ziplab_in1k', URL + 'lit_m.pth', top1=83.0, params=49.4, macs=8.6, **PAPER)],
)
register(
    'lit_b',
    LIT,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    drop_path=0.5,
    weights=[weights('ziplab_in1k', URL + 'lit_b.pth', top1=83.4, params=87.3, macs=15.0, **PAPER)],
)
