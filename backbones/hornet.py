"""HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, arXiv 2207.14284.

Written from the paper and the facts of the authors' code, https://github.com/raoyongming/HorNet (MIT). Differs: 1x1
convolutions are linear layers; sizes that strides do not divide are padded where the authors' convolutions drop border
pixels; the scale of the spatial mixing is folded into the layer before it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import global_filter, linear, resample_filter
from .layers import (
    ConvDownsample,
    LayerNorm,
    MetaFormerBlock,
    Mlp,
    build_mixer,
    drop_path_schedule,
    mixer,
    norm_factory,
)
from .layers.grid import ceil_div, to_first
from .layers.linear import Linear
from .registry import register, weights
from .sizes import Resampled
from .skeleton import Hierarchical, check_stages, per_stage, rename


# B batch, C channels, H W size of the current stage
class DepthwiseConv(nn.Conv2d):
    """7x7 depthwise convolution of (B, H, W, C), times `scale`."""

    def __init__(self, dim: int, *, scale: float):
        super().__init__(dim, dim, 7, padding=3, groups=dim)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        weight, bias = self.weight * self.scale, self.bias * self.scale  # a pass over the map less
        return F.conv2d(to_first(x), weight, bias, padding=3, groups=self.groups).permute(0, 2, 3, 1)


class GlobalLocalFilter(nn.Module):
    """A 3x3 depthwise convolution of the first half of the channels, a global filter of the second, times `scale`.

    Normalised before and after; the halves' channels take turns in the output. A filter made for another size of map
    is resampled bilinearly between frequencies.

    Args:
        grid: (H, W) of the map that the filter is made for.
    """

    def __init__(self, dim: int, *, grid: tuple[int, int] = (14, 14), scale: float = 1.0):
        super().__init__()
        if dim % 2:
            raise ValueError(f'the global-local filter needs an even number of channels, got {dim=}')
        self.scale = scale
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, grid[0], grid[1] // 2 + 1, 2))
        self.pre_norm, self.post_norm = LayerNorm(dim), LayerNorm(dim)
        nn.init.trunc_normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        local, distant = self.pre_norm(x).chunk(2, -1)
        local = self.dw(to_first(local)).permute(0, 2, 3, 1)
        filters = resample_filter(self.complex_weight.permute(1, 2, 0, 3), x.shape[1], x.shape[2], 'bilinear')
        distant = global_filter(distant, filters)
        norm = self.post_norm
        return F.layer_norm(
            torch.stack((local, distant), -1).flatten(-2),
            list(norm.normalized_shape),
            norm.weight * self.scale,
            norm.bias * self.scale,
            norm.eps,
        )


@mixer('gnconv')
class GnConv(nn.Module):
    """Recursive gated convolution of order n: n elementwise products, each of twice as many channels as the last.

    With widths C / 2^(n-1), ..., C / 2, C: p = gate[0] * mix[0], then p = linear(p) * mix[i]; mix is a large depthwise
    convolution or a global-local filter of all widths together.

    Args:
        order: n.
        scale: factor of mix.
        filters: take the global-local filter instead of the 7x7 convolution.
        grid: (H, W) of the map that the filter is made for; 14 x 14 if None.
    """

    def __init__(
        self,
        *,
        dim: int,
        order: int = 3,
        scale: float = 1 / 3,
        filters: bool = False,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise ValueError(f'gnconv of order n needs a multiple of 2^(n - 1) channels, got {order=}, {dim=}')
        self.widths = [dim // 2**i for i in reversed(range(order))]
        mixed = sum(self.widths)
        self.proj_in = Linear(dim, self.widths[0] + mixed)
        self.dwconv = (
            GlobalLocalFilter(mixed, grid=grid or (14, 14), scale=scale)
            if filters
            else DepthwiseConv(mixed, scale=scale)
        )
        self.pws = nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(self.widths))
        self.proj_out = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        first = self.widths[0]
        weight, bias = self.proj_in.weight, self.proj_in.bias
        # two products, so that the map to mix is contiguous
        gate, mixed = linear(x, weight[:first], bias[:first]), linear(x, weight[first:], bias[first:])
        factors = self.dwconv(mixed).split(self.widths, -1)
        out = gate * factors[0]
        for widen, factor in zip(self.pws, factors[1:]):
            out = widen(out) * factor
        return self.proj_out(out)


class HorNet(Hierarchical):
    """Blocks of recursive gated convolutions, whose order rises from stage to stage.

    Args:
        depths, dims: blocks and channels of each stage.
        mixers: token mixer by name or dict(name=..., option=...), one for all stages or one per stage.
        orders: of 'gnconv', one for all stages or one per stage.
        filters: whether 'gnconv' mixes by global-local filters, one for all stages or one per stage.
        gnconv_scale: factor of what 'gnconv' mixes.
        mlp_ratio: width of the MLPs over that of the stage.
        norm: normalisation throughout, by name.
        layer_scale: start value of the branches' learnable scales; None leaves them out.
        dense: 'det' or 'seg', the authors' dense forms: filters made for images of `img_size`, or of 384 pixels.
        img_size: height and width that filters are made for, 224 if None; they are resampled for other sizes.
        The others: see `Hierarchical.assemble`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 3, 18, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = 'gnconv',
        orders: int | Sequence[int] = (2, 3, 4, 5),
        filters: bool | Sequence[bool] = False,
        gnconv_scale: float = 1 / 3,
        mlp_ratio: float = 4.0,
        norm: str = 'layer',
        layer_scale: float | None = 1e-6,
        dense: str = 'det',
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
        if dense not in ('det', 'seg'):
            raise ValueError(f"dense must be 'det' or 'seg', got {dense=}")
        if img_size is None:
            img_size = 384 if features_only and dense == 'seg' else 224
        height, width = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        make_norm = norm_factory(norm)
        stages = []
        for dim, stride, spec, order, filtered, rates in zip(
            dims,
            self.strides,
            per_stage('mixers', mixers),
            per_stage('orders', orders),
            per_stage('filters', filters),
            drop_path_schedule(depths, drop_path_rate),
        ):
            if spec == 'gnconv':
                spec = dict(name='gnconv', order=order, filters=filtered, scale=gnconv_scale)
            grid = (ceil_div(height, stride), ceil_div(width, stride))
            stages.append(
                [
                    MetaFormerBlock(
                        dim=dim,
                        norm=make_norm,
                        mixer=build_mixer(spec, dim=dim, grid=grid),
                        mlp=Mlp(dim=dim, ratio=mlp_ratio),
                        drop_path=rate,
                        layer_scale=layer_scale,
                    )
                    for rate in rates
                ]
            )
        self.assemble(
            dims=dims,
            downsamplings=[
                ConvDownsample(in_chans, dims[0], kernel=4, stride=4, padding=0, post_norm=make_norm, image=True),
                *(
                    ConvDownsample(a, b, kernel=2, stride=2, padding=0, pre_norm=make_norm)
                    for a, b in itertools.pairwise(dims)
                ),
            ],
            stages=stages,
            output_norm=make_norm,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if any(isinstance(module, GlobalLocalFilter) for module in self.modules()):
            self.sizes = Resampled(how='filters are interpolated between frequencies, as the authors do')
        self.apply(self.init_weights)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'downsample_layers\.0\.0\.', 'downsample_layers.0.conv.'),
    (r'downsample_layers\.0\.1\.', 'downsample_layers.0.post_norm.'),
    (r'downsample_layers\.(\d)\.0\.', r'downsample_layers.\1.pre_norm.'),
    (r'downsample_layers\.(\d)\.1\.', r'downsample_layers.\1.conv.'),
    (r'stages\.(\d+)\.(\d+)\.gamma(\d)$', r'stages.\1.\2.layer_scale\3.scale'),
    (r'stages\.(\d+)\.(\d+)\.gnconv\.', r'stages.\1.\2.token_mixer.'),
    (r'stages\.(\d+)\.(\d+)\.pwconv(\d)\.', r'stages.\1.\2.mlp.fc\3.'),
    (r'norm(\d)\.', r'output_norms.\1.'),
]

_CLOUD = 'https://cloud.tsinghua.edu.cn/f/{}/?dl=1'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2207.14284',
    'origin': 'https://github.com/raoyongming/HorNet',
    'licence': 'mit',
    'crop_pct': 0.875,
}
_TINY, _SMALL, _BASE, _LARGE = (tuple(width * 2**s for s in range(4)) for width in (64, 96, 128, 192))
_FILTERS = (False, False, True, True)  # in the last two stages

register(
    'hornet_tiny_7x7',
    HorNet,
    dims=_TINY,
    drop_path=0.2,
    weights=[weights('in1k', _CLOUD.format('bac9690c72944d19aca1'), top1=82.8, params=22, macs=4.0, **_PAPER)],
)

register(
    'hornet_tiny_gf',
    HorNet,
    dims=_TINY,
    filters=_FILTERS,
    drop_path=0.2,
    weights=[weights('in1k', _CLOUD.format('460e759c82324ea6bfa3'), top1=83.0, params=23, macs=3.9, **_PAPER)],
)

register(
    'hornet_small_7x7',
    HorNet,
    dims=_SMALL,
    drop_path=0.4,
    weights=[weights('in1k', _CLOUD.format('8ef64277da0e469ea857'), top1=83.8, params=50, macs=8.8, **_PAPER)],
)

register(
    'hornet_small_gf',
    HorNet,
    dims=_SMALL,
    filters=_FILTERS,
    drop_path=0.4,
    weights=[weights('in1k', _CLOUD.format('959603ca287d4c09ad49'), top1=84.0, params=50, macs=8.7, **_PAPER)],
)

register(
    'hornet_base_7x7',
    HorNet,
    dims=_BASE,
    drop_path=0.5,
    weights=[weights('in1k', _CLOUD.format('13a748487711492e9704'), top1=84.2, params=87, macs=15.6, **_PAPER)],
)

register(
    'hornet_base_gf',
    HorNet,
    dims=_BASE,
    filters=_FILTERS,
    drop_path=0.5,
    weights=[weights('in1k', _CLOUD.format('c212d1d8a3914b47a5c1'), top1=84.3, params=88, macs=15.5, **_PAPER)],
)

# pre-trained on the 10450 classes of ImageNet-22k; params are those with 1000 classes (published with theirs: 209, 211,
# 216 at 384), no top-1 of the published files is stated
register(
    'hornet_large_7x7',
    HorNet,
    dims=_LARGE,
    drop_path=0.2,
    weights=[
        weights(
            'in22k',
            _CLOUD.format('c2fc23caae084a3aa73d'),
            top1=None,
            params=194.5,
            macs=34.8,
            num_classes=10450,
            **_PAPER,
        )
    ],
)

register(
    'hornet_large_gf',
    HorNet,
    dims=_LARGE,
    filters=_FILTERS,
    drop_path=0.2,
    weights=[
        weights(
            'in22k',
            _CLOUD.format('8600206ebdfa485f98d0'),
            top1=None,
            params=196.3,
            macs=34.7,
            num_classes=10450,
            **_PAPER,
        )
    ],
)

register(
    'hornet_large_gf_img384',
    HorNet,
    dims=_LARGE,
    filters=_FILTERS,
    img_size=384,
    drop_path=0.4,
    weights=[
        weights(
            'in22k_384',
            _CLOUD.format('eec48d5eca5a48d98fd2'),
            top1=None,
            params=201.8,
            macs=101.8,
            num_classes=10450,
            size=384,
            **_PAPER,
        )
    ],
)

register(
    'hornet_base_gf_img384',
    HorNet,
    dims=_BASE,
    filters=_FILTERS,
    img_size=384,
    drop_path=0.5,
    weights=[weights('in1k', None, top1=None, params=92.1, macs=None, size=384, **_PAPER)],
)
