"""Pyramid Vision Transformer, arXiv 2102.12122.

Written from the paper and the facts of the authors' code, https://github.com/whai362/PVT (Apache-2.0; the weights carry
the same licence). Differs: sizes that a stride does not divide are padded where the authors' patch embeddings drop
border pixels; position embeddings are resampled bilinearly at every other size, where the authors' code takes a table
as it is whenever the map has as many positions as the first stage's table.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layers import ConvDownsample, MetaFormerBlock, Mlp, build_mixer, drop_path_schedule, norm_factory
from .layers.grid import ceil_div, grid_of
from .layers.norm import NormFactory
from .layers.resize import resize_table, same_size
from .pvt_v2 import BLOCK_RENAMES
from .registry import register, weights
from .sizes import Resampled
from .skeleton import Hierarchical, check_stages, normalise_indices, per_stage, rename

# B batch, C channels, H W size of the current stage, N positions of the map, r reduction of keys and values


class PositionedDownsample(ConvDownsample):
    """Patch embedding that adds a learned vector per position; the table is resampled for maps of another size.

    Args:
        grid: (H, W) of the map that the table is made for.
        extra: entries before those of the positions, for class tokens.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        patch: int,
        norm: NormFactory,
        grid: tuple[int, int],
        extra: int = 0,
        image: bool = False,
    ):
        super().__init__(in_dim, dim, kernel=patch, stride=patch, padding=0, post_norm=norm, image=image)
        self.grid, self.extra = grid, extra
        self.pos_embed = nn.Parameter(torch.empty(1, extra + grid[0] * grid[1], dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.positions(x.shape[1], x.shape[2])

    def positions(self, height: int, width: int) -> Tensor:
        """(1, height, width, C)."""
        table = self.pos_embed[:, self.extra :].unflatten(1, self.grid)
        if same_size((height, width), self.grid):
            return table
        return _resize(table, (height, width))

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Resizes a table made for another square image to the size of ours, in place."""
        table = state.get(prefix + 'pos_embed')
        if table is None or table.shape == self.pos_embed.shape:
            return
        side = math.isqrt(table.shape[1] - self.extra)
        if side * side == table.shape[1] - self.extra:
            positions = _resize(table[:, self.extra :].unflatten(1, (side, side)), self.grid).flatten(1, 2)
            state[prefix + 'pos_embed'] = torch.cat([table[:, : self.extra], positions], 1)


def _resize(table: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, H, W, C) -> (1, *size, C)."""
    return resize_table(table[0], size, 'bilinear')[None].to(table.dtype)


class PVT(Hierarchical):
    """Attention to a smaller map, position embeddings, and a class token in the last stage of the classifier.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, sr_ratios, mlp_ratios: attention heads, reduction of keys and values and width of the MLPs over that
            of the stage; one for all stages or one per stage.
        mixers: token mixer, one for all stages or one per stage: 'sra' with the arguments above, or another by name or
            dict(name=..., option=...).
        norm: normalisation of blocks and classifier, by name or what makes it.
        embed_norm: the same after patch embeddings and in spatial reduction.
        class_token: the classifier reads a token that attends to the map in the last stage; else the mean of the map.
        final_norm: the classifier has a norm.
        img_size: height and width that the position embeddings are made for; 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='position embeddings, bilinearly')
    same_maps_in_dense = False  # there is no class token for the last stage to attend to
    new_in_dense = ()
    classifier_keys = ('norm.', 'head.', 'cls_token')
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 2, 1),
        'dims': (32, 64, 96, 128),
        'num_heads': (1, 2, 3, 4),
        'mlp_ratios': 2.0,
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: int | Sequence[int] = (1, 2, 5, 8),
        sr_ratios: int | Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: float | Sequence[float] = (8, 8, 4, 4),
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = 'sra',
        norm: str | NormFactory = 'layer',
        embed_norm: str | NormFactory = 'layer_eps5',
        class_token: bool = True,
        final_norm: bool = True,
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
        mixers, sr_ratios = per_stage('mixers', mixers), per_stage('sr_ratios', sr_ratios)
        if class_token and (sr_ratios[3] != 1 or mixers[3] not in ('sra', 'attention')):
            raise ValueError(
                'a class token needs plain attention in the last stage, got '
                f"mixers[3]={mixers[3]!r}, sr_ratios[3]={sr_ratios[3]}; pass class_token=False or use 'sra' with 1"
            )
        make_norm, make_embed_norm = (norm_factory(n) if isinstance(n, str) else n for n in (norm, embed_norm))
        grids = [grid_of(img_size, stride) for stride in self.strides]
        stages = []
        for dim, grid, heads, ratio, mlp_ratio, spec, rates in zip(
            dims,
            grids,
            per_stage('num_heads', num_heads),
            sr_ratios,
            per_stage('mlp_ratios', mlp_ratios),
            mixers,
            drop_path_schedule(depths, drop_path_rate),
        ):
            if spec in ('sra', 'reduced_sla'):
                spec = dict(name=spec, num_heads=heads, sr_ratio=ratio, norm=embed_norm)
            stages.append(
                [
                    MetaFormerBlock(
                        dim=dim,
                        norm=make_norm,
                        mixer=build_mixer(spec, dim=dim, grid=grid),
                        drop_path=rate,
                        mlp=Mlp(dim=dim, ratio=mlp_ratio),
                    )
                    for rate in rates
                ]
            )
        self.assemble(
            dims=dims,
            downsamplings=[
                PositionedDownsample(
                    before,
                    dim,
                    patch=4 if s == 0 else 2,
                    norm=make_embed_norm,
                    grid=grids[s],
                    extra=int(class_token and s == 3),
                    image=s == 0,
                )
                for s, (before, dim) in enumerate(itertools.pairwise((in_chans, *dims)))
            ],
            stages=stages,
            output_norm=None,
            norm=make_norm if final_norm else lambda dim: nn.Identity(),
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dims[3])) if class_token and not features_only else None
        self.apply(self.init_weights)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """As in `Hierarchical`; with a class token the result of forward_features is that token, (B, C, 1, 1)."""
        if self.cls_token is None:
            return super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        stop_early = stop_early or intermediates_only
        last, maps = super().forward_intermediates(x, indices, norm, stop_early, output_fmt)
        has_last_map = 3 in normalise_indices(4 if indices is None else indices, 4)
        if has_last_map:  # (B, C, 1, 1 + N)
            height, width = (ceil_div(size, self.strides[3]) for size in x.shape[2:])
            final = last[:, :, 0, 1:].unflatten(2, (height, width))
            maps[-1] = final if output_fmt == 'NCHW' else final.permute(0, 2, 3, 1)
        if has_last_map or not stop_early:
            last = last[..., :1]
        return maps if intermediates_only else (last, maps)

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        if self.cls_token is not None and blocks is self.stages[3]:
            position = self.downsample_layers[3].get_parameter('pos_embed')[:, :1]
            token = (self.cls_token + position).expand(x.shape[0], -1, -1)
            x = torch.cat([token, x.flatten(1, 2)], 1)[:, None]  # (B, 1, 1 + N, C)
        return super()._run(blocks, x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As in `Hierarchical`; the class token learns with the last stage's first layers."""
        matcher = super().group_matcher(coarse)
        matcher['blocks'].append((r'^cls_token', (3,) if coarse else (3, 0)))
        return matcher

    def no_weight_decay(self) -> set[str]:
        return {'cls_token'} if self.cls_token is not None else set()

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers as the authors' are; convolutions keep PyTorch's own initialisation, as theirs do."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, _RENAMES)


_RENAMES = [
    *BLOCK_RENAMES,
    *((rf'pos_embed{s + 1}$', f'downsample_layers.{s}.pos_embed') for s in range(4)),
]

_URL = 'https://github.com/whai362/PVT/releases/download/v2/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2102.12122',
    'origin': 'https://github.com/whai362/PVT',
    'crop_pct': 0.875,
}

register(
    'pvt_tiny',
    PVT,
    depths=(2, 2, 2, 2),
    drop_path=0.1,
    weights=[weights('in1k', _URL + 'pvt_tiny.pth', top1=75.1, params=13.2, macs=1.9, **_PAPER)],
)
register(
    'pvt_small',
    PVT,
    depths=(3, 4, 6, 3),
    drop_path=0.1,
    weights=[weights('in1k', _URL + 'pvt_small.pth', top1=79.8, params=24.5, macs=3.8, **_PAPER)],
)
register(
    'pvt_medium',
    PVT,
    depths=(3, 4, 18, 3),
    drop_path=0.3,
    weights=[weights('in1k', _URL + 'pvt_medium.pth', top1=81.2, params=44.2, macs=6.7, **_PAPER)],
)
register(
    'pvt_large',
    PVT,
    depths=(3, 8, 27, 3),
    drop_path=0.3,
    weights=[weights('in1k', _URL + 'pvt_large.pth', top1=81.7, params=61.4, macs=9.8, **_PAPER)],
)
