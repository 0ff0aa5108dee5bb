"""Parallel blocks and the hMLP stem: Three things everyone should know about Vision Transformers, arXiv 2203.09795.

Written from the paper and the facts of the authors' code, https://github.com/facebookresearch/deit (Apache-2.0). The
stem is `layers.patches.HMlpStem`; the third thing, training the attention alone, is `attention_only`. Differs: batch
norm is nn.BatchNorm2d, where the authors' is synchronised (`torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes it
so); other sizes and the dense form as in deit.py. No weights were published.
"""

# B batch, N tokens, C channels, H W size of the grid
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .backbone import rename
from .deit import ORIGIN, RENAMES, DeiT
from .layers import Mlp, Scale, build_token_mixer, norm_factory
from .layers.fold_norm import fold_into_next
from .layers.grid import grid_of
from .layers.norm import NormFactory
from .layers.patches import build_stem
from .layers.positions import PositionTable
from .layers.scale import fold_scale
from .plain import Plain, block_windows, check_plain
from .registry import register, weights


class Branch(nn.Module):
    """s * drop(part(norm(x))): what a parallel block adds to its tokens."""

    def __init__(self, dim: int, part: nn.Module, norm: NormFactory, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.norm = norm(dim)
        self.part = part
        self.drop_path = DropPath(drop_path)
        self.layer_scale = Scale(dim, init=layer_scale) if layer_scale is not None else None

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return self.scaled(self.part(self.norm(x), *context))

    def scaled(self, x: Tensor) -> Tensor:
        """s * drop(x)."""
        x = self.drop_path(x)
        return x if self.layer_scale is None else self.layer_scale(x)

    def for_deploy(self) -> nn.Module:
        """The same branch in evaluation mode: its scale inside its last linear layer, an affine norm in the first."""
        self.norm = fold_into_next(self.norm, self.part)
        self.layer_scale = fold_scale(self.part, self.layer_scale)
        return self


class ParallelBlock(nn.Module):
    """x = x + sum of attention branches of x, then x = x + sum of MLP branches of x; (B, N, C) -> (B, N, C)."""

    def __init__(self, attns: Sequence[Branch], mlps: Sequence[Branch]):
        super().__init__()
        self.attns = nn.ModuleList(attns)
        self.mlps = nn.ModuleList(mlps)

    def forward(self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None) -> Tensor:
        return self.mix_channels(self.mix_tokens(x, grid, bias))

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None) -> Tensor:
        """The first half; `bias` as in `TokenAttention`."""
        context = (grid,) if bias is None else (grid, bias)
        return x + sum(branch(x, *context) for branch in self.attns)

    def mix_channels(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + sum(branch(x) for branch in self.mlps)

    # ---- the first half in its steps, see `reduction.interface`: the heads of all branches side by side

    @property
    def any_tokens(self) -> bool:
        return all(getattr(branch.part, 'any_tokens', False) for branch in self.attns)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = zip(*(branch.part.split(branch.norm(x)) for branch in self.attns))  # type: ignore
        return torch.cat(query, 1), torch.cat(key, 1), torch.cat(value, 1)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = zip(*(branch.part.query_key(branch.norm(x)) for branch in self.attns))  # type: ignore
        return torch.cat(query, 1), torch.cat(key, 1)

    def value(self, x: Tensor) -> Tensor:
        return torch.cat([branch.part.value(branch.norm(x)) for branch in self.attns], 1)  # type: ignore

    def weigh(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.cat([part.weigh(*heads) for part, *heads in self._by_branch(query, key, bias=bias)], 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.cat([part.attend(*heads) for part, *heads in self._by_branch(query, key, value, bias=bias)], 1)

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        for branch, heads in zip(self.attns, out.chunk(len(self.attns), 1)):
            normed = branch.norm(x) if getattr(branch.part, 'gate', None) is not None else x  # type: ignore
            x = x + branch.scaled(branch.part.join(heads, normed))  # type: ignore
        return x

    def _by_branch(self, *heads: Tensor, bias: Tensor | None) -> Iterator[tuple[Any, ...]]:
        count = len(self.attns)
        apart = bias.chunk(count, 1) if bias is not None and bias.shape[1] > 1 else [bias] * count
        for branch, *own in zip(self.attns, *(part.chunk(count, 1) for part in heads), apart):
            yield (branch.part, *own)


class ParallelViT(Plain):
    """A vision transformer of parallel blocks, positions for patches alone, constant stochastic depth.

    Args:
        depth, dim: blocks and channels.
        parallel: branches of each kind in a block.
        num_heads: attention heads.
        patch_size: pixels of a patch's side, and their stride.
        stem: 'linear' or 'hmlp' (patches of 16).
        mlp_ratio, qkv_bias, token_mixer, norm, layer_scale, window_size, global_blocks, pyramid_dim, pyramid_blocks,
            img_size: as in `DeiT`.
        The others: see `Plain.assemble`.
    """

    drop_path_rises = False

    def __init__(
        self,
        *,
        depth: int = 6,
        dim: int = 192,
        parallel: int = 2,
        num_heads: int = 3,
        patch_size: int = 16,
        stem: str = 'linear',
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        token_mixer: str | Mapping[str, Any] = 'attention',
        norm: str = 'layer',
        layer_scale: float | None = None,
        window_size: int | None = None,
        global_blocks: Sequence[int] | None = None,
        pyramid_dim: int | None = None,
        pyramid_blocks: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        check_plain(depth=depth, dim=dim, patch_size=patch_size)
        if parallel < 1:
            raise ValueError(f'parallel must be positive, got {parallel=}')
        make_norm = norm_factory(norm)
        blocks = []
        for window in block_windows(depth, window_size, global_blocks):
            attns, mlps = [], []
            for _ in range(parallel):
                attention = build_token_mixer(
                    token_mixer, dim=dim, num_heads=num_heads, prefix=1, qkv_bias=qkv_bias, window_size=window
                )
                attns.append(Branch(dim, attention, make_norm, layer_scale, drop_path_rate))
                mlps.append(Branch(dim, Mlp(dim=dim, ratio=mlp_ratio), make_norm, layer_scale, drop_path_rate))
            blocks.append(ParallelBlock(attns, mlps))
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=build_stem(stem, in_chans=in_chans, dim=dim, patch_size=patch_size),
            position=PositionTable(dim, grid_of(img_size, patch_size), method=DeiT.resize_method),
            prefix=('cls_token',),
            blocks=blocks,
            norm=make_norm,
            pooling='token',
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)
        self.init_prefix()

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, where branches of a block are told apart by a suffix."""
        return rename(state, [*_PARALLEL, *RENAMES])


_B = r'blocks\.(\d+)\.'
_PARALLEL = [
    (_B + r'gamma_1$', r'blocks.\1.attns.0.layer_scale.scale'),
    (_B + r'gamma_2$', r'blocks.\1.mlps.0.layer_scale.scale'),
    (_B + r'gamma_1_1$', r'blocks.\1.attns.1.layer_scale.scale'),
    (_B + r'gamma_2_1$', r'blocks.\1.mlps.1.layer_scale.scale'),
    (_B + r'norm1\.', r'blocks.\1.attns.0.norm.'),
    (_B + r'norm2\.', r'blocks.\1.mlps.0.norm.'),
    (_B + r'norm11\.', r'blocks.\1.attns.1.norm.'),
    (_B + r'norm21\.', r'blocks.\1.mlps.1.norm.'),
    (_B + r'attn\.', r'blocks.\1.attns.0.part.'),
    (_B + r'mlp\.', r'blocks.\1.mlps.0.part.'),
    (_B + r'attn1\.', r'blocks.\1.attns.1.part.'),
    (_B + r'mlp1\.', r'blocks.\1.mlps.1.part.'),
]


def attention_only(model: nn.Module) -> list[str]:
    """Leaves a backbone's attention, positions, classifier and pyramid trainable and freezes the rest, in place.

    What the paper proposes for other image sizes and for transfer.

    Returns:
        Names of the trainable parameters.

    Raises:
        ValueError: the model has no module called attn.
    """
    names = [name for name, _ in model.named_parameters()]
    heads = ('head.', *getattr(model, 'new_in_dense', ()), 'pos_embed')
    chosen = [name for name in names if re.search(r'\.(?:attn|attns\.\d+\.part)\.', name)]
    if not chosen:
        raise ValueError(f'attention_only needs modules called attn, {type(model).__name__} has none')
    chosen += [name for name in names if name.startswith(heads)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return sorted(chosen)


_PAPER: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2203.09795', 'crop_pct': 1.0, 'top1': None, **ORIGIN}


def _described(params: float) -> list[Any]:
    """Models of the authors' code, of which no weights were published."""
    return [weights('in1k', None, params=params, macs=None, **_PAPER)]


register('vit_tiny_paralx2_6x2', ParallelViT, depth=6, dim=192, parallel=2, num_heads=3, weights=_described(5.7))
register(
    'vit_tiny_paralx2_6x2_ls',
    ParallelViT,
    depth=6,
    dim=192,
    parallel=2,
    num_heads=3,
    layer_scale=1e-4,
    weights=_described(5.7),
)
register(
    'vit_tiny_hmlp_stem_d4',
    DeiT,
    depth=4,
    dim=192,
    num_heads=3,
    stem='hmlp',
    layer_scale=1e-4,
    class_position=False,
    constant_drop_path=True,
    weights=[weights('in1k', None, params=2.1, macs=None, **{**_PAPER, 'first_conv': 'patch_embed.proj.0'})],
)
register('deit_small_patch16_18x2', ParallelViT, depth=18, dim=384, parallel=2, num_heads=6, weights=_described(64.6))
register(
    'deit_small_patch16_18x2_ls',
    ParallelViT,
    depth=18,
    dim=384,
    parallel=2,
    num_heads=6,
    layer_scale=1e-4,
    weights=_described(64.6),
)
register('deit_base_patch16_18x2', ParallelViT, depth=18, dim=768, parallel=2, num_heads=12, weights=_described(256.7))
register(
    'deit_base_patch16_18x2_ls',
    ParallelViT,
    depth=18,
    dim=768,
    parallel=2,
    num_heads=12,
    layer_scale=1e-4,
    weights=_described(256.7),
)
