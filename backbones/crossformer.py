"""CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention, arXiv 2108.00154, and CrossFormer++,
arXiv 2303.06908.

Written from the papers and the facts of the authors' code, https://github.com/cheerss/CrossFormer (MIT). Differs: the
classifier takes every size and groups each map as theirs does when built for that size; maps of odd height or width are
padded before downsampling, where theirs stops with an error; a block of their dense form that has met a small map
attends to short distances for good, ours does on small maps alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import window_attention
from .layers import MetaFormerBlock, Mlp, build_mixer, drop_path_schedule, mixer, norm_factory
from .layers.dynamic_position_bias import DynamicPositionBias
from .layers.grid import grid_of, pad_bottom_right, to_first, to_last
from .layers.linear import Linear
from .layers.norm import NormFactory
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage, rename

# B batch, C channels, H W size of the current stage, h heads, G side of a group, N positions of a group


class CrossScaleEmbedding(nn.Module):
    """Convolutions of several kernels around the same centres, side by side: half of the channels from the smallest
    kernel, then half of the rest each.

    Args:
        kernels: sides, increasing by factors of 2; the smallest is the stride.
        norm: makes the normalisation, of the input if that is a map, of the output if it is an image.
        image: the input is (B, C, H, W), an image, instead of (B, H, W, C), a map.
    """

    def __init__(
        self, in_dim: int, dim: int, *, kernels: Sequence[int], stride: int, norm: NormFactory, image: bool = False
    ):
        super().__init__()
        parts = [dim >> min(i + 1, len(kernels) - 1) for i in range(len(kernels))]
        if sum(parts) != dim:
            raise ValueError(f'dims must be multiples of {2 ** (len(kernels) - 1)}, half for each kernel, got {dim=}')
        self.image, self.stride = image, stride
        self.projs = nn.ModuleList(
            nn.Conv2d(in_dim, part, kernel, stride, (kernel - stride) // 2) for part, kernel in zip(parts, kernels)
        )
        self.norm = norm(dim if image else in_dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.image:
            x = to_first(self.norm(x))
        x = pad_bottom_right(x, self.stride)
        x = to_last(torch.cat([proj(x) for proj in self.projs], 1))
        return self.norm(x) if self.image else x


@mixer('group')
class GroupAttention(nn.Module):
    """Attention within groups of G x G positions: neighbours, or every `interval`-th one of a larger square.

    Padding below and to the right fills the last groups and is not attended to.

    Args:
        dim: channels.
        num_heads: attention heads; dim // 32 if None.
        group_size: side G of the groups.
        interval: distance of neighbours in a group; 1 for short-distance attention.
        span_small_maps: maps that are at most G high or wide are one group; otherwise G shrinks to the smaller side.
            Either way the interval is 1 on them.
        qkv_bias: whether q, k and v have a bias.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        group_size: int = 7,
        interval: int = 1,
        span_small_maps: bool = False,
        qkv_bias: bool = True,
    ):
        super().__init__()
        if num_heads is None:
            num_heads = next(n for n in range(max(dim // 32, 1), 0, -1) if dim % n == 0)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads must divide the width of its stage, got {num_heads=}, {dim=}')
        if group_size < 1 or interval < 1:
            raise ValueError(f'group_size and interval must be positive, got {group_size=}, {interval=}')
        self.num_heads, self.group_size, self.interval = num_heads, group_size, interval
        self.span_small_maps = span_small_maps
        reach = 4 * group_size if span_small_maps else group_size  # small maps up to four times as long as wide
        self.pos = DynamicPositionBias(dim, num_heads, window=group_size, reach=reach)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width, interval = self.group(*x.shape[1:3])
        bias = self.pos(height, width)
        return self.proj(
            window_attention(self.qkv(x), (height, width), heads=self.num_heads, bias=bias, dilation=interval)
        )

    def group(self, H: int, W: int) -> tuple[int, int, int]:
        """Height and width of the groups on a map, and the distance of neighbours in them."""
        side = self.group_size
        if side < H and side < W:
            return side, side, self.interval
        if self.span_small_maps:
            return H, W, 1
        return min(H, W), min(H, W), 1

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, group_size={self.group_size}, interval={self.interval}'


class CoolingBlock(MetaFormerBlock):
    """A block and, in place of the residual stream, a norm of its depthwise convolution, which keeps activations small.

    Args:
        dim, norm: as for the block.
        options: the block's other arguments.
    """

    def __init__(self, *, dim: int, norm: NormFactory, **options: Any):
        super().__init__(dim=dim, norm=norm, **options)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.ex_ln = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ex_ln(to_last(self.ex_conv(to_first(super().forward(x)))))


class CrossFormer(Hierarchical):
    """Cross-scale embeddings; attention to short and to long distances in turn.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, group_size, interval: attention heads, side of the groups, and distance of neighbours in the groups
            of every second block; one for all stages or one per stage.
        cooling: whether every third block but a stage's last one ends with a cooling layer (CrossFormer++).
        span_small_maps: how maps no larger than a group are grouped, see `GroupAttention`.
        mlp_ratio: width of the MLPs over that of the stage.
        qkv_bias: whether q, k and v have a bias.
        mixers: token mixer, one for all stages or one per stage: 'group' with the arguments above, or another by name
            or dict(name=..., option=...).
        norm: normalisation throughout, by name.
        img_size: height and width that size-dependent mixers are made for; 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    norm_first = True
    new_in_dense = ()
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 4, 1),
        'dims': (64, 64, 96, 128),
        'num_heads': (2, 2, 3, 4),
        'group_size': (4, 3, 2, 2),
        'interval': (3, 2, 2, 1),
        'span_small_maps': True,  # as in the dense form, whose maps the tests compare with the classifier's
        'mlp_ratio': 2.0,
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 1, 8, 6),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: int | Sequence[int] = (2, 4, 8, 16),
        group_size: int | Sequence[int] = 7,
        interval: int | Sequence[int] = (8, 4, 2, 1),
        cooling: bool = False,
        span_small_maps: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = 'group',
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
        groups, intervals = per_stage('group_size', group_size), per_stage('interval', interval)
        specs = per_stage('mixers', mixers)
        stages = []
        for dim, stride, heads, side, distance, spec, rates in zip(
            dims,
            self.strides,
            per_stage('num_heads', num_heads),
            groups,
            intervals,
            specs,
            drop_path_schedule(depths, drop_path_rate),
        ):
            options = dict(name='group', num_heads=heads, group_size=side, qkv_bias=qkv_bias)
            options['span_small_maps'] = span_small_maps
            blocks: list[nn.Module] = []
            for b, rate in enumerate(rates):
                chosen = dict(options, interval=distance if b % 2 else 1) if spec == 'group' else spec
                cools = cooling and b % 3 == 2 and b < len(rates) - 1
                blocks.append(
                    (CoolingBlock if cools else MetaFormerBlock)(
                        dim=dim,
                        norm=make_norm,
                        mixer=build_mixer(chosen, dim=dim, grid=grid_of(img_size, stride)),
                        drop_path=rate,
                        mlp=Mlp(dim=dim, ratio=mlp_ratio, act='gelu'),
                    )
                )
            stages.append(blocks)
        merge = partial(CrossScaleEmbedding, kernels=(2, 4), stride=2, norm=make_norm)
        self.assemble(
            dims=dims,
            downsamplings=[
                CrossScaleEmbedding(in_chans, dims[0], kernels=(4, 8, 16, 32), stride=4, norm=make_norm, image=True),
                *(merge(a, b) for a, b in itertools.pairwise(dims)),
            ],
            stages=stages,
            output_norm=None,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        spans = [stride * side * distance for stride, side, distance in zip(self.strides, groups, intervals)]
        largest = [span for span, spec in zip(spans, specs) if spec == 'group']
        self.min_dynamic_size = max([32, *largest]) + 1  # type: ignore[misc]  # more than one group in every stage
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """The authors': truncated normal in linear layers; convolutions keep PyTorch's own initialisation."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, where downsampling is part of the stage before it."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'patch_embed\.', 'downsample_layers.0.'),
    *((rf'layers\.{s}\.downsample\.reductions\.', f'downsample_layers.{s + 1}.projs.') for s in range(3)),
    *((rf'layers\.{s}\.downsample\.', f'downsample_layers.{s + 1}.') for s in range(3)),
    (r'layers\.(\d+)\.blocks\.(\d+)\.attn\.', r'stages.\1.\2.token_mixer.'),
    (r'layers\.(\d+)\.blocks\.', r'stages.\1.'),
]

_ORIGIN = 'https://github.com/cheerss/CrossFormer'
_PUBLISHED: dict[str, Any] = {
    'tag': 'in1k',
    'url': None,
    'page': _ORIGIN + '#image-classification',
    'origin': _ORIGIN,
    'licence': 'mit',
    'crop_pct': 0.875,
    'first_conv': 'downsample_layers.0.projs.0',
}
_PAPER: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2108.00154', **_PUBLISHED}
_PAPER_PP: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2303.06908', **_PUBLISHED}
_DENSE = {'span_small_maps': True}
_DENSE_PP = {'span_small_maps': True, 'group_size': 7, 'interval': (8, 4, 2, 1)}
_SMALL, _BASE, _LARGE = ((d, 2 * d, 4 * d, 8 * d) for d in (64, 96, 128))
_HEADS_SMALL, _HEADS_BASE, _HEADS_LARGE = ((n, 2 * n, 4 * n, 8 * n) for n in (2, 3, 4))

register(
    'crossformer_tiny',
    CrossFormer,
    depths=(1, 1, 8, 6),
    dims=_SMALL,
    num_heads=_HEADS_SMALL,
    dense=_DENSE,
    drop_path=0.1,
    weights=[weights(top1=81.5, params=27.8, macs=2.9, **_PAPER)],
)
register(
    'crossformer_small',
    CrossFormer,
    depths=(2, 2, 6, 2),
    dims=_BASE,
    num_heads=_HEADS_BASE,
    dense=_DENSE,
    drop_path=0.2,
    weights=[weights(top1=82.5, params=30.7, macs=4.9, **_PAPER)],
)
register(
    'crossformer_base',
    CrossFormer,
    depths=(2, 2, 18, 2),
    dims=_BASE,
    num_heads=_HEADS_BASE,
    dense=_DENSE,
    drop_path=0.3,
    weights=[weights(top1=83.4, params=52.0, macs=9.2, **_PAPER)],
)
register(
    'crossformer_large',
    CrossFormer,
    depths=(2, 2, 18, 2),
    dims=_LARGE,
    num_heads=_HEADS_LARGE,
    dense=_DENSE,
    drop_path=0.5,
    weights=[weights(top1=84.0, params=92.0, macs=16.1, **_PAPER)],
)

# progressive group sizes: small, small, the whole map at 224, the whole map
_GROUPS: dict[str, Any] = {'group_size': (4, 4, 14, 7), 'interval': (4, 2, 1, 1), 'cooling': True, 'dense': _DENSE_PP}

register(
    'crossformer_pp_small',
    CrossFormer,
    depths=(2, 2, 18, 2),
    dims=_SMALL,
    num_heads=_HEADS_SMALL,
    drop_path=0.2,
    weights=[weights(top1=83.2, params=23.3, macs=4.9, **_PAPER_PP)],
    **_GROUPS,
)
register(
    'crossformer_pp_base',
    CrossFormer,
    depths=(2, 2, 18, 2),
    dims=_BASE,
    num_heads=_HEADS_BASE,
    drop_path=0.3,
    weights=[weights(top1=84.2, params=52.0, macs=9.5, **_PAPER_PP)],
    **_GROUPS,
)
register(
    'crossformer_pp_large',
    CrossFormer,
    depths=(2, 2, 18, 2),
    dims=_LARGE,
    num_heads=_HEADS_LARGE,
    drop_path=0.5,
    weights=[weights(top1=84.7, params=92.0, macs=16.6, **_PAPER_PP)],
    **_GROUPS,
)
register(
    'crossformer_pp_huge',
    CrossFormer,
    depths=(6, 6, 18, 2),
    dims=_LARGE,
    num_heads=_HEADS_LARGE,
    drop_path=0.5,
    weights=[weights(top1=84.9, params=96.0, macs=21.8, **_PAPER_PP)],
    **_GROUPS,
)
