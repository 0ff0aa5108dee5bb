"""PVTv2: Improved Baselines with Pyramid Vision Transformer, arXiv 2106.13797.

Written from the paper and the facts of the authors' code, https://github.com/whai362/PVT (Apache-2.0; the weights carry
the same licence). Differs: maps smaller than the reduction of keys and values are padded up to it, where the authors'
code stops with an error.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import average_pool
from .layers import ConvDownsample, ConvMlp, MetaFormerBlock, build_mixer, drop_path_schedule, mixer, norm_factory
from .layers.fold_norm import fold_into_previous
from .layers.grid import to_first
from .layers.linear import Linear
from .layers.norm import NormFactory
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage, rename

# B batch, C channels, H W size of the current stage, h heads, d head width, r reduction of keys and values


def resolve_heads(dim: int, num_heads: int | None, head_dim: int = 32) -> int:
    """`num_heads` if it divides `dim`; if None, as many heads as are at least `head_dim` wide, and divide.

    Raises:
        ValueError: it does not divide.
    """
    if num_heads is None:
        return next(n for n in range(max(dim // head_dim, 1), 0, -1) if dim % n == 0)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f'num_heads must divide the width of its stage, got {num_heads=}, {dim=}')
    return num_heads


@mixer('sra')
class SpatialReductionAttention(nn.Module):
    """Attention of all positions to a smaller map: blocks of r x r positions made one by a strided convolution.

    Args:
        dim: channels.
        num_heads: attention heads; dim // 32 if None.
        sr_ratio: side r of the blocks; rows and columns beyond the last whole block are dropped, as in the published
            models. 1 attends to the map itself.
        pool_size: side of the map that the map is average-pooled to instead ("linear" attention); `sr_ratio` is
            ignored then.
        norm: normalisation of the smaller map, by name or what makes it.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        sr_ratio: int = 1,
        pool_size: int | None = None,
        norm: str | NormFactory = 'layer_eps5',
    ):
        super().__init__()
        if sr_ratio < 1 or (pool_size is not None and pool_size < 1):
            raise ValueError(f'sr_ratio and pool_size must be positive, got {sr_ratio=}, {pool_size=}')
        self.num_heads = resolve_heads(dim, num_heads)
        self.sr_ratio, self.pool_size = sr_ratio, pool_size
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        make_norm = norm_factory(norm) if isinstance(norm, str) else norm
        if pool_size is not None:
            self.sr: nn.Module = Linear(dim, dim)
            self.norm = make_norm(dim)
        elif sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = make_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        query = self.q(x).view(B, H * W, self.num_heads, -1).transpose(1, 2)
        kv = self.kv(self.reduce(x)).flatten(1, 2).unflatten(2, (2, self.num_heads, -1))
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))

    def reduce(self, x: Tensor) -> Tensor:
        """The map that keys and values are made of."""
        if self.pool_size is not None:
            pooled = average_pool(to_first(x), self.pool_size).permute(0, 2, 3, 1)
            return F.gelu(self.norm(self.sr(pooled)))
        if self.sr_ratio == 1:
            return x
        x = to_first(x)
        height, width = x.shape[-2:]
        if isinstance(height, int) and isinstance(width, int) and min(height, width) < self.sr_ratio:
            x = F.pad(x, (0, max(self.sr_ratio - width, 0), 0, max(self.sr_ratio - height, 0)))
        return self.norm(self.sr(x).permute(0, 2, 3, 1))

    @property
    def first_linears(self) -> tuple[str, ...]:
        """The layers that alone read the input, for norms folded into them."""
        return ('q', 'kv') if self.pool_size is None and self.sr_ratio == 1 else ()

    def for_deploy(self) -> nn.Module:
        """The same in evaluation mode, with a norm that is affine inside the convolution before it."""
        if self.pool_size is not None or self.sr_ratio > 1:
            self.norm = fold_into_previous(self.sr, self.norm)
        return self

    def extra_repr(self) -> str:
        reduction = f'sr_ratio={self.sr_ratio}' if self.pool_size is None else f'pool_size={self.pool_size}'
        return f'num_heads={self.num_heads}, {reduction}'


class PVTv2(Hierarchical):
    """Attention to a smaller map and MLPs with a depthwise convolution, which also tells positions apart.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, sr_ratios, mlp_ratios: attention heads, reduction of keys and values and width of the MLPs over that
            of the stage; one for all stages or one per stage.
        linear: keys and values from the map pooled to 7 x 7, and a ReLU more in the MLPs.
        mixers: token mixer, one for all stages or one per stage: 'sra' with the arguments above, or another by name or
            dict(name=..., option=...).
        norm: normalisation of blocks and stages, by name.
        img_size: not needed, taken for the sake of mixers that are made for one size.
        The others: see `Hierarchical.assemble`.
    """

    new_in_dense = ()  # the norm after each stage is the classifier's too
    classifier_keys = ('head.',)
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
        dims: Sequence[int] = (32, 64, 160, 256),
        num_heads: int | Sequence[int] = (1, 2, 5, 8),
        sr_ratios: int | Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: float | Sequence[float] = (8, 8, 4, 4),
        linear: bool = False,
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = 'sra',
        norm: str = 'layer',
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
        embed = partial(ConvDownsample, post_norm=norm_factory('layer_eps5'))
        stages = []
        for dim, heads, ratio, mlp_ratio, spec, rates in zip(
            dims,
            per_stage('num_heads', num_heads),
            per_stage('sr_ratios', sr_ratios),
            per_stage('mlp_ratios', mlp_ratios),
            per_stage('mixers', mixers),
            drop_path_schedule(depths, drop_path_rate),
        ):
            if spec == 'sra':
                spec = dict(name='sra', num_heads=heads, sr_ratio=ratio, pool_size=7 if linear else None)
            blocks: list[nn.Module] = [
                MetaFormerBlock(
                    dim=dim,
                    norm=make_norm,
                    mixer=build_mixer(spec, dim=dim),
                    drop_path=rate,
                    mlp=ConvMlp(dim=dim, ratio=mlp_ratio, extra_act=linear),
                )
                for rate in rates
            ]
            stages.append([*blocks, make_norm(dim)])
        self.assemble(
            dims=dims,
            downsamplings=[
                embed(in_chans, dims[0], kernel=7, stride=4, padding=3, image=True),
                *(embed(a, b, kernel=3, stride=2, padding=1) for a, b in itertools.pairwise(dims)),
            ],
            stages=stages,
            output_norm=None,
            norm=lambda dim: nn.Identity(),
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """The authors': truncated normal in linear layers, normal with deviation sqrt(2 / fan_out) in convolutions."""
        if isinstance(module, nn.Conv2d):
            init_fan_out(module)
        else:
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, where the norm after a stage is beside its blocks; here it is the last of them."""
        state = rename(state, BLOCK_RENAMES)
        for s in range(4):
            depth = len({key.split('.')[2] for key in state if key.startswith(f'stages.{s}.')})
            state = rename(state, [(rf'norm{s + 1}\.', f'stages.{s}.{depth}.')])
        return state


def init_fan_out(conv: nn.Conv2d) -> None:
    """Normal weights with deviation sqrt(2 / (k * k * out channels / groups)), no bias."""
    nn.init.normal_(conv.weight, std=math.sqrt(2 * conv.groups / (math.prod(conv.kernel_size) * conv.out_channels)))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


# PVT's and PVTv2's names of what they share
BLOCK_RENAMES = [
    *((rf'patch_embed{s + 1}\.proj\.', f'downsample_layers.{s}.conv.') for s in range(4)),
    *((rf'patch_embed{s + 1}\.norm\.', f'downsample_layers.{s}.post_norm.') for s in range(4)),
    *((rf'block{s + 1}\.(\d+)\.attn\.', rf'stages.{s}.\1.token_mixer.') for s in range(4)),
    *((rf'block{s + 1}\.(\d+)\.mlp\.dwconv\.dwconv\.', rf'stages.{s}.\1.mlp.dwconv.') for s in range(4)),
    *((rf'block{s + 1}\.', f'stages.{s}.') for s in range(4)),
]

_URL = 'https://github.com/whai362/PVT/releases/download/v2/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2106.13797',
    'origin': 'https://github.com/whai362/PVT',
    'crop_pct': 0.875,
}
_WIDE = (64, 128, 320, 512)

register(
    'pvt_v2_b0',
    PVTv2,
    depths=(2, 2, 2, 2),
    dims=(32, 64, 160, 256),
    drop_path=0.1,
    weights=[weights('in1k', _URL + 'pvt_v2_b0.pth', top1=70.5, params=3.7, macs=0.6, **_PAPER)],
)
register(
    'pvt_v2_b1',
    PVTv2,
    depths=(2, 2, 2, 2),
    dims=_WIDE,
    drop_path=0.1,
    weights=[weights('in1k', _URL + 'pvt_v2_b1.pth', top1=78.7, params=14.0, macs=2.1, **_PAPER)],
)
register(
    'pvt_v2_b2',
    PVTv2,
    depths=(3, 4, 6, 3),
    dims=_WIDE,
    drop_path=0.1,
    weights=[weights('in1k', _URL + 'pvt_v2_b2.pth', top1=82.0, params=25.4, macs=4.0, **_PAPER)],
)
register(
    'pvt_v2_b2_li',
    PVTv2,
    depths=(3, 4, 6, 3),
    dims=_WIDE,
    linear=True,
    drop_path=0.1,
    weights=[weights('in1k', _URL + 'pvt_v2_b2_li.pth', top1=82.1, params=22.6, macs=3.9, **_PAPER)],
)
register(
    'pvt_v2_b3',
    PVTv2,
    depths=(3, 4, 18, 3),
    dims=_WIDE,
    drop_path=0.3,
    weights=[weights('in1k', _URL + 'pvt_v2_b3.pth', top1=83.1, params=45.2, macs=6.9, **_PAPER)],
)
register(
    'pvt_v2_b4',
    PVTv2,
    depths=(3, 8, 27, 3),
    dims=_WIDE,
    drop_path=0.3,
    weights=[weights('in1k', _URL + 'pvt_v2_b4.pth', top1=83.6, params=62.6, macs=10.1, **_PAPER)],
)
register(
    'pvt_v2_b5',
    PVTv2,
    depths=(3, 6, 40, 3),
    dims=_WIDE,
    mlp_ratios=4.0,
    drop_path=0.3,
    weights=[weights('in1k', _URL + 'pvt_v2_b5.pth', top1=83.8, params=82.0, macs=11.8, **_PAPER)],
)
