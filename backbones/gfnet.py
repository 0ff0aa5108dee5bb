"""GFNet: Global Filter Networks for Image Classification, arXiv 2107.00645; hierarchical models and plain ones.

Written from the paper and the facts of the authors' code, https://github.com/raoyongming/GFNet (MIT). Differs: other
sizes than the one that filters and positions were made for are taken, by the interpolation that the authors use for
fine-tuning at another size; sizes that strides do not divide are padded. The authors published no dense form: that of
the hierarchical models returns the stages' raw maps, or normalises them by `output_norm`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..kernels import global_filter, resample_filter
from .layers import (
    ConvDownsample,
    Mlp,
    Scale,
    TokenBlock,
    build_token_mixer,
    drop_path_schedule,
    mixer,
    norm_factory,
)
from .layers.grid import grid_of
from .layers.norm import NormFactory
from .layers.positions import PositionTable
from .layers.resize import resize_table, same_size
from .plain import Plain, block_windows, check_plain
from .registry import register, weights
from .sizes import Resampled
from .skeleton import Hierarchical, check_stages, rename


# B batch, C channels, H W size of the current stage or of the grid, N = H * W
@mixer('global_filter')
class GlobalFilter(nn.Module):
    """Each channel times learned complex weights in the frequencies of the map.

    Args:
        grid: (H, W) of the map that the weights are made for, 14 x 14 if None; for others they are resampled.
    """

    def __init__(self, *, dim: int, grid: tuple[int, int] | None = None):
        super().__init__()
        height, width = grid or (14, 14)
        self.complex_weight = nn.Parameter(torch.randn(height, width // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return global_filter(x, resample_filter(self.complex_weight, x.shape[1], x.shape[2]))

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Interpolates a checkpoint's weights, made for another size, between frequencies."""
        weight = state.get(prefix + 'complex_weight')
        if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[2:] == self.complex_weight.shape[2:]:
            height, frequencies = self.complex_weight.shape[:2]
            state[prefix + 'complex_weight'] = resample_filter(weight, height, 2 * (frequencies - 1)).to(weight.dtype)

    def extra_repr(self) -> str:
        height, frequencies, dim, _ = self.complex_weight.shape
        return f'dim={dim}, frequencies=({height}, {frequencies})'


class GFNetBlock(nn.Module):
    """Norm, global filter, norm and MLP in one residual branch: none is around the filter alone.

    Args:
        dim: channels.
        grid: (H, W) of the map that the filter is made for.
        norm: makes the norms.
        mlp_ratio: width of the MLP over dim.
        layer_scale: start value of a learnable scale per channel; None leaves it out.
        drop_path: probability of dropping the branch for an image while training.
    """

    def __init__(
        self,
        *,
        dim: int,
        grid: tuple[int, int],
        norm: NormFactory,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.filter = GlobalFilter(dim=dim, grid=grid)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim=dim, ratio=mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.layer_scale = Scale(dim, init=layer_scale) if layer_scale is not None else None

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, H, W, C) -> the same, or (B, N, C) of a map of size `grid`."""
        branch = self.norm1(x)
        branch = self.filter(branch) if grid is None else self.filter(branch.unflatten(1, grid)).flatten(1, 2)
        branch = self.drop_path(self.mlp(self.norm2(branch)))
        return x + branch if self.layer_scale is None else torch.addcmul(x, branch, self.layer_scale.scale)


class PositionedStem(ConvDownsample):
    """Patches of 4 x 4 pixels plus a table of positions, (1, H * W, C), resampled bicubically for other sizes."""

    def __init__(self, in_chans: int, dim: int, *, grid: tuple[int, int]):
        super().__init__(in_chans, dim, kernel=4, stride=4, padding=0, image=True)
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        height, width = x.shape[1:3]
        table = self.pos_embed[0].unflatten(0, self.grid)
        if not same_size((height, width), self.grid):
            table = resize_table(table, (height, width), 'bicubic').to(table.dtype)
        return x + table


class GFNet(Hierarchical):
    """Blocks of global filters and MLPs, without norms between stages.

    Args:
        depths, dims: blocks and channels of each stage.
        mlp_ratio: width of the MLPs over that of the stage.
        layer_scale: start value of the branches' learnable scales; None leaves them out.
        norm: normalisation throughout, by name.
        output_norm: normalisation of the dense form's maps, by name; None returns the stages' raw maps.
        img_size: height and width that filters and positions are made for, 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='filters between frequencies and positions bicubically, as the authors fine-tune')
    norm_first = True

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 10, 3),
        dims: Sequence[int] = (64, 128, 256, 512),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-3,
        norm: str = 'layer',
        output_norm: str | None = None,
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
        make_norm = norm_factory(norm)
        grids = [grid_of(img_size, stride) for stride in self.strides]
        stages = [
            [
                GFNetBlock(
                    dim=dim,
                    grid=grid,
                    norm=make_norm,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    drop_path=rate,
                )
                for rate in rates
            ]
            for dim, grid, rates in zip(dims, grids, drop_path_schedule(depths, drop_path_rate))
        ]
        self.assemble(
            dims=dims,
            downsamplings=[
                PositionedStem(in_chans, dims[0], grid=grids[0]),
                *(ConvDownsample(a, b, kernel=2, stride=2, padding=0) for a, b in itertools.pairwise(dims)),
            ],
            stages=stages,
            output_norm=norm_factory(output_norm) if output_norm else None,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers and positions as the authors'; convolutions keep PyTorch's own initialisation."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)
        elif isinstance(module, PositionedStem):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {'downsample_layers.0.pos_embed'}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, _RENAMES)


class PlainGFNet(Plain):
    """Blocks of global filters at one resolution, attention in the last ones on request; the mean of all tokens.

    Args:
        depth, dim: blocks and channels.
        filter_blocks: how many of the first blocks have filters, all if None; the others have attention.
        num_heads: of attention.
        patch_size: pixels of a patch's side, and their stride.
        mlp_ratio: width of the MLPs over dim.
        norm: normalisation throughout, by name.
        qkv_bias, token_mixer, window_size, global_blocks: of the blocks with attention, as in `DeiT`.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: height and width that filters and positions are made for, 224 if None.
        The others: see `Plain.assemble`.
    """

    sizes = Resampled(how='filters between frequencies and positions bicubically, as the authors fine-tune')
    reduced: ClassVar[dict[str, Any]] = {**Plain.reduced, 'depth': 3}

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 256,
        filter_blocks: int | None = None,
        num_heads: int = 4,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        norm: str = 'layer',
        qkv_bias: bool = True,
        token_mixer: str | Mapping[str, Any] = 'attention',
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
        if filter_blocks is not None and filter_blocks < 0:
            raise ValueError(f'filter_blocks must not be negative, got {filter_blocks=}')
        make_norm, grid = norm_factory(norm), grid_of(img_size, patch_size)
        windows = block_windows(depth, window_size, global_blocks)
        blocks: list[nn.Module] = []
        for i, rate in enumerate(drop_path_schedule([depth], drop_path_rate)[0]):
            if filter_blocks is None or i < filter_blocks:
                block = GFNetBlock(
                    dim=dim, grid=grid, norm=make_norm, mlp_ratio=mlp_ratio, layer_scale=None, drop_path=rate
                )
                blocks.append(block)
                continue
            attention = build_token_mixer(
                token_mixer, dim=dim, num_heads=num_heads, qkv_bias=qkv_bias, window_size=windows[i]
            )
            mlp = Mlp(dim=dim, ratio=mlp_ratio)
            blocks.append(TokenBlock(dim=dim, norm=make_norm, attn=attention, mlp=mlp, drop_path=rate))
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=ConvDownsample(in_chans, dim, kernel=patch_size, stride=patch_size, padding=0, image=True),
            position=PositionTable(dim, grid, method='bicubic'),
            prefix=(),
            blocks=blocks,
            norm=make_norm,
            pooling='avg',
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, [(r'pos_embed$', 'pos_embed.table'), (r'patch_embed\.proj\.', 'patch_embed.conv.')])


_RENAMES = [
    (r'pos_embed$', 'downsample_layers.0.pos_embed'),
    (r'patch_embed\.(\d)\.proj\.', r'downsample_layers.\1.conv.'),
    (r'blocks\.(\d+)\.(\d+)\.gamma$', r'stages.\1.\2.layer_scale.scale'),
    (r'blocks\.', 'stages.'),
]

_CLOUD = 'https://cloud.tsinghua.edu.cn/f/{}/?dl=1'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2107.00645',
    'origin': 'https://github.com/raoyongming/GFNet',
    'licence': 'mit',
    'crop_pct': 0.875,
}
_PLAIN: dict[str, Any] = {**_PAPER, 'first_conv': 'patch_embed.conv'}

# the authors' program gives tiny and extra small models no stochastic depth
register(
    'gfnet_ti',
    PlainGFNet,
    dim=256,
    weights=[weights('in1k', _CLOUD.format('3d0c1579aa524a0a99dd'), top1=74.6, params=7, macs=1.3, **_PLAIN)],
)
# the authors' class at a size whose grid, 15 x 15, is odd; no weights were published, parameters are counted
register(
    'gfnet_ti_240',
    PlainGFNet,
    dim=256,
    img_size=240,
    weights=[weights('in1k', None, top1=None, params=7.6, macs=None, size=240, **_PLAIN)],
)
register(
    'gfnet_xs',
    PlainGFNet,
    dim=384,
    weights=[weights('in1k', _CLOUD.format('e0ab5b1583954a1fa9b2'), top1=78.6, params=16, macs=2.8, **_PLAIN)],
)
register(
    'gfnet_s',
    PlainGFNet,
    depth=19,
    dim=384,
    drop_path=0.15,
    weights=[weights('in1k', _CLOUD.format('e5561fa070c44d9399bf'), top1=80.0, params=25, macs=4.5, **_PLAIN)],
)
register(
    'gfnet_b',
    PlainGFNet,
    depth=19,
    dim=512,
    drop_path=0.25,
    weights=[weights('in1k', _CLOUD.format('2fbf264597af4d72afb3'), top1=80.7, params=43, macs=7.9, **_PLAIN)],
)
register(
    'gfnet_h_ti',
    GFNet,
    depths=(3, 3, 10, 3),
    dims=(64, 128, 256, 512),
    layer_scale=1e-3,
    drop_path=0.1,
    weights=[weights('in1k', _CLOUD.format('b22dd45eccbe462cbbfb'), top1=80.1, params=15, macs=2.0, **_PAPER)],
)
register(
    'gfnet_h_s',
    GFNet,
    depths=(3, 3, 10, 3),
    dims=(96, 192, 384, 768),
    layer_scale=1e-5,
    drop_path=0.2,
    weights=[weights('in1k', _CLOUD.format('5229cb4d1daf48e69675'), top1=81.5, params=32, macs=4.5, **_PAPER)],
)
register(
    'gfnet_h_b',
    GFNet,
    depths=(3, 3, 27, 3),
    dims=(96, 192, 384, 768),
    layer_scale=1e-6,
    drop_path=0.4,
    weights=[weights('in1k', _CLOUD.format('954c5af21e824ba6b40c'), top1=82.9, params=54, macs=8.4, **_PAPER)],
)
