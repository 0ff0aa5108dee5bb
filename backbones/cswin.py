"""CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows, arXiv 2107.00652.

Written from the paper and the facts of the authors' code, https://github.com/microsoft/CSWin-Transformer (MIT; the
weights carry the same licence). Differs: the classifier takes every size as the authors' dense form does, padding maps
to whole stripes (theirs is built for one square size and has a single branch in stages whose map is as wide as a
stripe, here only the last stage has); sizes that stride 4 does not divide are padded where the authors' stem drops
border pixels.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import window_attention
from .layers import ConvDownsample, MetaFormerBlock, Mlp, build_mixer, drop_path_schedule, mixer, norm_factory
from .layers.grid import ceil_div, grid_of, to_first
from .layers.linear import Linear
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage, rename

# B batch, C channels, H W size of the current stage, h heads, wh ww size of a stripe


class StripeAttention(nn.Module):
    """Attention within stripes of the map, plus a depthwise convolution of the values that ends at their borders.

    Maps that stripes do not divide are padded on both sides with positions whose q, k and v are 0 and that are attended
    to like all others.

    Args:
        dim: channels.
        num_heads: attention heads.
        height, width: of the stripes; None spans the map.
    """

    def __init__(self, dim: int, num_heads: int, *, height: int | None, width: int | None):
        super().__init__()
        self.num_heads, self.height, self.width = num_heads, height, width
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C), channels ordered (q | k | v), to (B, H, W, C)."""
        B, H, W, C3 = qkv.shape
        value = qkv[..., C3 // 3 * 2 :]
        if self.height is None and self.width is None:
            out = self._attend(qkv.reshape(B, H * W, C3)).reshape(B, H, W, C3 // 3)
            return out + self.get_v(to_first(value)).permute(0, 2, 3, 1)
        if not (isinstance(H, int) and isinstance(W, int)):
            return self._symbolic(qkv)
        window = (H if self.height is None else self.height, W if self.width is None else self.width)
        _, _, top, _, left, _ = self._grid(H, W)
        out = window_attention(qkv, window, heads=self.num_heads, outside=qkv.new_zeros(C3), pad=(top, left))
        return out + self.position(value)

    def position(self, value: Tensor) -> Tensor:
        """The convolution of the values (B, H, W, C), "locally-enhanced position encoding"."""
        B, H, W, C = value.shape
        conv = self.get_v
        if (self.height, self.width) in ((None, 1), (1, None)):  # what lies beside a stripe meets one line of weights
            tall = self.height is None
            weight, padding = (conv.weight[..., 1:2], (1, 0)) if tall else (conv.weight[:, :, 1:2], (0, 1))
            return F.conv2d(to_first(value), weight, conv.bias, padding=padding, groups=C).permute(0, 2, 3, 1)
        rows, cols, top, bottom, left, right = self._grid(H, W)
        if top or bottom or left or right:
            value = F.pad(value, (0, 0, left, right, top, bottom))
        out = conv(to_first(self._cut(value, rows, cols))).permute(0, 2, 3, 1)
        return self._paste(out, rows, cols, B)[:, top : top + H, left : left + W]

    def _symbolic(self, qkv: Tensor) -> Tensor:
        """The same for exporters of dynamic sizes: padded first, so that all arithmetic is on whole stripes."""
        B, H, W, C3 = qkv.shape
        rows, cols, top, bottom, left, right = self._grid(H, W)
        stripes = self._cut(F.pad(qkv, (0, 0, left, right, top, bottom)), rows, cols)
        out = self._attend(stripes.flatten(1, 2)).reshape(*stripes.shape[:3], C3 // 3)
        out = out + self.get_v(to_first(stripes[..., C3 // 3 * 2 :])).permute(0, 2, 3, 1)
        return self._paste(out, rows, cols, B)[:, top : top + H, left : left + W]

    def _attend(self, qkv: Tensor) -> Tensor:
        """(B, N, 3C) -> (B, N, C), all positions to all."""
        parts = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

    def _grid(self, H: int, W: int) -> tuple[int, int, int, int, int, int]:
        """Rows and columns of stripes; padding above, below, left and right: halves, the first one rounded down."""
        rows = 1 if self.height is None else ceil_div(H, self.height)
        cols = 1 if self.width is None else ceil_div(W, self.width)
        tall = 0 if self.height is None else rows * self.height - H
        wide = 0 if self.width is None else cols * self.width - W
        return rows, cols, tall // 2, tall - tall // 2, wide // 2, wide - wide // 2

    def _cut(self, x: Tensor, rows: int, cols: int) -> Tensor:
        """(B, H, W, C) -> (B * stripes, height, width, C); rows or cols is 1."""
        B, H, W, C = x.shape
        if self.width is None:
            return x.reshape(B * rows, self.height or H, W, C)
        return x.reshape(B, H, cols, self.width, C).transpose(1, 2).reshape(B * cols, H, self.width, C)

    def _paste(self, x: Tensor, rows: int, cols: int, batch: int) -> Tensor:
        """What `_cut` cut."""
        _, height, width, C = x.shape
        if self.width is None:
            return x.reshape(batch, rows * height, width, C)
        return x.reshape(batch, cols, height, width, C).transpose(1, 2).reshape(batch, height, cols * width, C)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, height={self.height}, width={self.width}'


@mixer('stripe')
class CrossShapedAttention(nn.Module):
    """One half of the channels attends within vertical stripes, the other within horizontal ones.

    Args:
        dim: channels.
        num_heads: attention heads of both halves together; about dim // 32 if None.
        split_size: width of vertical and height of horizontal stripes; None for attention between all positions, by
            all channels.
        bias: whether the linear layer that makes q, k and v has one.
    """

    first_linears: ClassVar[tuple[str, ...]] = ('qkv',)

    def __init__(self, *, dim: int, num_heads: int | None = None, split_size: int | None = 7, bias: bool = True):
        super().__init__()
        branches = 1 if split_size is None else 2
        num_heads = _heads(dim, num_heads, branches)
        if split_size is not None and split_size < 1:
            raise ValueError(f'split_size must be positive, or None for the whole map, got {split_size=}')
        attend = partial(StripeAttention, dim // branches, num_heads // branches)
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.attns = nn.ModuleList(
            [attend(height=None, width=None)]
            if split_size is None
            else [attend(height=None, width=split_size), attend(height=split_size, width=None)]
        )
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if len(self.attns) == 1:
            return self.proj(self.attns[0](qkv))
        # (q | k | v, half, C / 2) -> (half, q | k | v, C / 2)
        halves = qkv.unflatten(-1, (3, 2, -1)).transpose(-3, -2).flatten(-2).unbind(-2)
        return self.proj(torch.cat([attend(half) for attend, half in zip(self.attns, halves)], -1))


def _heads(dim: int, num_heads: int | None, branches: int) -> int:
    if num_heads is None:
        wanted = range(max(dim // 32, branches), 0, -1)
        num_heads = next((n for n in wanted if dim % n == 0 and n % branches == 0), branches)
    if num_heads < 1 or dim % num_heads or num_heads % branches:
        rule = 'divide the width of its stage' + (' and be even, half for each kind of stripe' if branches == 2 else '')
        raise ValueError(f'num_heads must {rule}, got {num_heads=}, {dim=}')
    return num_heads


class CSWin(Hierarchical):
    """Cross-shaped windows that widen from stage to stage; the last stage attends to the whole map.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, split_size: attention heads and width of the stripes (None: the whole map), one for all stages or one
            per stage.
        mlp_ratio: width of the MLPs over that of the stage.
        qkv_bias: whether q, k and v have a bias.
        mixers: token mixer, one for all stages or one per stage: 'stripe' with the arguments above, or another by name
            or dict(name=..., option=...).
        norm: normalisation of stem, blocks, downsampling, classifier and output maps, by name.
        img_size: height and width that size-dependent mixers are made for; 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    norm_first = True
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 2, 1),
        'dims': (32, 64, 96, 128),
        'num_heads': (2, 2, 4, 4),
        'split_size': (1, 2, 2, None),
        'mlp_ratio': 2.0,
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 2, 21, 1),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: int | Sequence[int] = (2, 4, 8, 16),
        split_size: int | Sequence[int | None] | None = (1, 2, 7, None),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = 'stripe',
        norm: str = 'layer_eps5',
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
        splits, specs = per_stage('split_size', split_size), per_stage('mixers', mixers)
        stages = []
        for dim, stride, heads, split, spec, rates in zip(
            dims,
            self.strides,
            per_stage('num_heads', num_heads),
            splits,
            specs,
            drop_path_schedule(depths, drop_path_rate),
        ):
            if spec in ('stripe', 'linear_stripe'):
                spec = dict(name=spec, num_heads=heads, split_size=split, bias=qkv_bias)
            grid = grid_of(img_size, stride)
            stages.append(
                [
                    MetaFormerBlock(
                        dim=dim,
                        norm=make_norm,
                        mixer=build_mixer(spec, dim=dim, grid=grid),
                        drop_path=rate,
                        mlp=Mlp(dim=dim, ratio=mlp_ratio, act='gelu'),
                    )
                    for rate in rates
                ]
            )
        stem = ConvDownsample(in_chans, dims[0], kernel=7, stride=4, padding=2, post_norm=make_norm, image=True)
        downsample = partial(ConvDownsample, kernel=3, stride=2, padding=1, post_norm=make_norm)
        self.assemble(
            dims=dims,
            downsamplings=[stem, *(downsample(a, b) for a, b in itertools.pairwise(dims))],
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
        largest = [n * split for n, split, spec in zip(self.strides, splits, specs) if spec == 'stripe' and split]
        self.min_dynamic_size = max([32, *largest]) + 1  # type: ignore[misc]  # more than one stripe in every stage
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """The authors': truncated normal in linear layers; convolutions keep PyTorch's own initialisation."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, whose stages and output norms count from 1."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'stage1_conv_embed\.0\.', 'downsample_layers.0.conv.'),
    (r'stage1_conv_embed\.2\.', 'downsample_layers.0.post_norm.'),
    *((rf'merge{s}\.conv\.', f'downsample_layers.{s}.conv.') for s in (1, 2, 3)),
    *((rf'merge{s}\.norm\.', f'downsample_layers.{s}.post_norm.') for s in (1, 2, 3)),
    *((rf'stage{s + 1}\.(\d+)\.(qkv|proj|attns)\.', rf'stages.{s}.\1.token_mixer.\2.') for s in range(4)),
    *((rf'stage{s + 1}\.', f'stages.{s}.') for s in range(4)),
    *((rf'norm{s + 1}\.', f'output_norms.{s}.') for s in range(4)),
]

_URL = 'https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2107.00652',
    'origin': 'https://github.com/microsoft/CSWin-Transformer',
    'licence': 'mit',
}
_DEEP = (2, 4, 32, 2)
# params: counted; published as 23, 35, 78 and 173
_NARROW, _BASE, _LARGE = ((d, 2 * d, 4 * d, 8 * d) for d in (64, 96, 144))

register(
    'cswin_tiny',
    CSWin,
    depths=(1, 2, 21, 1),
    dims=_NARROW,
    num_heads=(2, 4, 8, 16),
    drop_path=0.2,
    weights=[weights('ms_in1k', _URL + 'cswin_tiny_224.pth', top1=82.8, params=22.3, macs=4.3, **_PAPER)],
)
register(
    'cswin_small',
    CSWin,
    depths=_DEEP,
    dims=_NARROW,
    num_heads=(2, 4, 8, 16),
    drop_path=0.4,
    weights=[weights('ms_in1k', _URL + 'cswin_small_224.pth', top1=83.6, params=35, macs=6.9, **_PAPER)],
)
register(
    'cswin_base',
    CSWin,
    depths=_DEEP,
    dims=_BASE,
    num_heads=(4, 8, 16, 32),
    drop_path=0.5,
    weights=[weights('ms_in1k', _URL + 'cswin_base_224.pth', top1=84.2, params=77.4, macs=15.0, **_PAPER)],
)
register(
    'cswin_base_384',
    CSWin,
    depths=_DEEP,
    dims=_BASE,
    num_heads=(4, 8, 16, 32),
    split_size=(1, 2, 12, None),
    drop_path=0.7,
    weights=[
        weights(
            'ms_in1k', _URL + 'cswin_base_384.pth', top1=85.5, params=77.4, macs=47.0, size=384, crop_pct=1.0, **_PAPER
        )
    ],
)
register(
    'cswin_large',
    CSWin,
    depths=_DEEP,
    dims=_LARGE,
    num_heads=(6, 12, 24, 24),
    drop_path=0.2,
    weights=[
        weights('ms_in22k_ft_in1k', _URL + 'cswin_large_224.pth', top1=86.5, params=173, macs=31.5, **_PAPER),
        weights(
            'ms_in22k',
            _URL + 'cswin_large_22k_224.pth',
            top1=None,
            params=173,
            macs=31.5,
            num_classes=21841,
            **_PAPER,
        ),
    ],
)
register(
    'cswin_large_384',
    CSWin,
    depths=_DEEP,
    dims=_LARGE,
    num_heads=(6, 12, 24, 24),
    split_size=(1, 2, 12, None),
    weights=[
        weights(
            'ms_in22k_ft_in1k',
            _URL + 'cswin_large_384.pth',
            top1=87.5,
            params=173,
            macs=96.8,
            size=384,
            crop_pct=1.0,
            **_PAPER,
        )
    ],
)
