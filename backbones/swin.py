"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030.

Written from the paper and the facts of the authors' code, https://github.com/microsoft/Swin-Transformer (MIT; the
weights carry the same licence). Differs: sizes are not fixed; where windows do not divide a map, the classifier pads
it as the authors' dense form does, and whether a block is shifted is decided at each size as theirs is at
construction. Padding is shifted along with the map (timm's Swin shifts first). Patch merging comes before a stage
instead of after it. Windows never shrink: maps smaller than a window are padded.
"""

# B batch, C channels, H W size of the current stage, h heads, N positions of a window
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..kernels import window_attention
from .layers import (
    MIXERS,
    ConvDownsample,
    MetaFormerBlock,
    Mlp,
    RelativePositionBias,
    build_mixer,
    drop_path_schedule,
    mixer,
    norm_factory,
)
from .layers.fold_norm import fold_into_next
from .layers.grid import grid_of, pad_bottom_right, to_first, to_last
from .layers.linear import Linear
from .layers.norm import NormFactory
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage, rename

Spec = str | Mapping[str, Any]


@mixer('window')
class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias per offset; odd blocks shift the windows.

    Padding, where windows do not divide the map, consists of zeros before `qkv`, so its keys and values are the bias.

    Args:
        dim: channels.
        num_heads: divides dim; dim // 32 if None, at least 1.
        window_size: side of the windows.
        shift: rows and columns that the windows are shifted by.
        always_shift: shift on maps of one window too (in height or in width).
        qkv_bias: learn a bias of queries, keys and values.
    """

    first_linears: ClassVar[tuple[str, ...]] = ('qkv',)
    outside: Tensor | None

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        window_size: int = 7,
        shift: int = 0,
        always_shift: bool = True,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads if num_heads is not None else max(dim // 32, 1)
        if self.num_heads < 1 or dim % self.num_heads:
            raise ValueError(f'num_heads must divide dim, got num_heads={self.num_heads}, {dim=}')
        if not 0 <= shift < window_size:
            raise ValueError(f'shift must be from 0 to window_size - 1, got {shift=}, {window_size=}')
        self.window_size, self.shift, self.always_shift = window_size, shift, always_shift
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.position_bias = RelativePositionBias(window_size, self.num_heads)
        self.proj = Linear(dim, dim)
        self.register_buffer('outside', None)  # q, k and v of padding, where they are not the bias: see fold_into_next

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        shift = self.shift
        if shift and not self.always_shift and min(H, W) <= self.window_size:
            shift = 0
        outside = self.qkv.bias if self.outside is None else self.outside
        outside = outside if outside is not None else x.new_zeros(3 * C)
        x = window_attention(
            self.qkv(x),
            self.window_size,
            shift,
            heads=self.num_heads,
            bias=self.position_bias(),
            outside=outside,
        )
        return self.proj(x)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}'


class PatchMerging(nn.Module):
    """Squares of 2 x 2 positions become one: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), dim)."""

    replaceable: ClassVar[bool] = True  # see `Hierarchical.set_downsampling`

    def __init__(self, in_dim: int, dim: int, *, norm: NormFactory):
        super().__init__()
        self.norm = norm(4 * in_dim)
        self.reduction = Linear(4 * in_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = to_last(pad_bottom_right(to_first(x), 2))
        B, H, W, C = x.shape
        # of a square, the rows of the left column come first, then those of the right one
        x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * C)
        return self.reduction(self.norm(x))

    def for_deploy(self) -> nn.Module:
        """The same layer in evaluation mode, with a norm that is affine inside the linear layer after it."""
        self.norm = fold_into_next(self.norm, self.reduction)
        return self


class Swin(Hierarchical):
    """Attention within windows, which every second block shifts by half their side.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads: attention heads of each stage.
        window_size: side of the windows, one for all stages or one per stage.
        mixers: token mixer by name or dict(name=..., option=...), one for all stages or one per stage. Those that know
            the options num_heads, window_size, shift, always_shift and qkv_bias get them as in the published model.
        norm: normalisation throughout, by name.
        mlp_ratio: width of the MLPs over that of the stage.
        qkv_bias: learn a bias of queries, keys and values.
        always_shift: shift on maps of one window too, as the authors' dense form does and their classifier does not.
        output_norm: normalisation of the dense form's maps, by name; None for `norm`.
        img_size: height and width that size-dependent mixers are made for; 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    norm_first = True
    # the last stage is too small for a second window at the sizes of tests: it has no shifted block
    reduced = {'depths': (2, 2, 2, 1), 'dims': (16, 32, 48, 64), 'num_heads': (1, 2, 3, 4), 'window_size': (4, 3, 2, 2)}

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        mixers: Spec | Sequence[Spec] = 'window',
        norm: str = 'layer_eps5',
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        always_shift: bool = False,
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
        windows = per_stage('window_size', window_size)
        if any(side < 1 for side in windows):
            raise ValueError(f'window_size must be positive, got {window_size=}')
        make_norm = norm_factory(norm)
        stem = ConvDownsample(in_chans, dims[0], kernel=4, stride=4, padding=0, post_norm=make_norm, image=True)
        stages = []
        for dim, heads, side, spec, stride, rates in zip(
            dims,
            per_stage('num_heads', num_heads),
            windows,
            per_stage('mixers', mixers),
            self.strides,
            drop_path_schedule(depths, drop_path_rate),
            strict=True,
        ):
            mixer_options = dict(num_heads=heads, window_size=side, qkv_bias=qkv_bias, always_shift=always_shift)
            grid = grid_of(img_size, stride)
            stages.append(
                [
                    MetaFormerBlock(
                        dim=dim,
                        norm=make_norm,
                        mixer=build_mixer(_complete(spec, mixer_options, shifted=n % 2 == 1), dim=dim, grid=grid),
                        mlp=Mlp(dim=dim, ratio=mlp_ratio),
                        drop_path=rate,
                    )
                    for n, rate in enumerate(rates)
                ]
            )
        self.assemble(
            dims=dims,
            downsamplings=[stem, *(PatchMerging(a, b, norm=make_norm) for a, b in itertools.pairwise(dims))],
            stages=stages,
            output_norm=norm_factory(output_norm) if output_norm else make_norm,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if not always_shift:  # below this size, whether a block is shifted depends on the size
            limits = [stride * side + 1 for stride, side, depth in zip(self.strides, windows, depths) if depth > 1]
            self.min_dynamic_size = max(limits, default=type(self).min_dynamic_size)  # type: ignore[misc]
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers as the authors'; the stem's convolution keeps PyTorch's own initialisation, as theirs does."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith('position_bias.table')}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, where patch merging ends a stage, and timm's, where it begins one."""
        state = {key.replace('layers_', 'layers.', 1): value for key, value in state.items()}
        from_timm = any(key.startswith('layers.3.downsample.') for key in state)
        moved = (rf'layers\.{s if from_timm else s - 1}\.downsample\.' for s in (1, 2, 3))
        merging = [(pattern, f'downsample_layers.{s}.') for s, pattern in enumerate(moved, 1)]
        return rename(state, [*merging, *_RENAMES])


def _complete(spec: Spec, options: Mapping[str, Any], *, shifted: bool) -> dict[str, Any]:
    """A mixer with those of the options that it knows, where it does not state them."""
    stated = {'name': spec} if isinstance(spec, str) else dict(spec)
    known = inspect.signature(MIXERS[stated['name']]).parameters if stated.get('name') in MIXERS else {}
    complete = {**{key: value for key, value in options.items() if key in known}, **stated}
    if 'shift' in known and shifted:
        complete.setdefault('shift', complete['window_size'] // 2)
    return complete


_BLOCK = r'layers\.(\d+)\.blocks\.(\d+)\.'
_RENAMES = [
    (r'patch_embed\.proj\.', 'downsample_layers.0.conv.'),
    (r'patch_embed\.norm\.', 'downsample_layers.0.post_norm.'),
    (_BLOCK + r'attn\.relative_position_bias_table$', r'stages.\1.\2.token_mixer.position_bias.table'),
    (_BLOCK + r'attn\.', r'stages.\1.\2.token_mixer.'),
    (_BLOCK, r'stages.\1.\2.'),
    (r'norm(\d)\.', r'output_norms.\1.'),
    (r'head\.fc\.', 'head.'),
]

_URL = 'https://github.com/SwinTransformer/storage/releases/download/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2103.14030',
    'origin': 'https://github.com/microsoft/Swin-Transformer',
    'licence': 'mit',
}
_TINY: dict[str, Any] = {'params': 28, 'macs': 4.5, 'crop_pct': 0.875, **_PAPER}
_SMALL: dict[str, Any] = {'params': 50, 'macs': 8.7, 'crop_pct': 0.875, **_PAPER}
_BASE: dict[str, Any] = {'params': 88, 'macs': 15.4, 'crop_pct': 0.875, **_PAPER}
_BASE_384: dict[str, Any] = {'params': 88, 'macs': 47.1, 'size': 384, 'crop_pct': 1.0, **_PAPER}
_LARGE: dict[str, Any] = {'params': 197, 'macs': 34.5, 'crop_pct': 0.875, **_PAPER}
_LARGE_384: dict[str, Any] = {'params': 197, 'macs': 103.9, 'size': 384, 'crop_pct': 1.0, **_PAPER}
_22K: dict[str, Any] = {'top1': None, 'num_classes': 21841}

register(
    'swin_tiny_patch4_window7_224',
    Swin,
    depths=(2, 2, 6, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    window_size=7,
    dense=dict(always_shift=True),
    drop_path=0.2,
    weights=[
        weights('ms_in1k', _URL + 'v1.0.0/swin_tiny_patch4_window7_224.pth', top1=81.2, **_TINY),
        weights(
            'ms_in22k_ft_in1k', _URL + 'v1.0.8/swin_tiny_patch4_window7_224_22kto1k_finetune.pth', top1=80.9, **_TINY
        ),
        weights('ms_in22k', _URL + 'v1.0.8/swin_tiny_patch4_window7_224_22k.pth', **_22K, **_TINY),
    ],
)
register(
    'swin_small_patch4_window7_224',
    Swin,
    depths=(2, 2, 18, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    window_size=7,
    dense=dict(always_shift=True),
    drop_path=0.3,
    weights=[
        weights('ms_in1k', _URL + 'v1.0.0/swin_small_patch4_window7_224.pth', top1=83.2, **_SMALL),
        weights(
            'ms_in22k_ft_in1k', _URL + 'v1.0.8/swin_small_patch4_window7_224_22kto1k_finetune.pth', top1=83.2, **_SMALL
        ),
        weights('ms_in22k', _URL + 'v1.0.8/swin_small_patch4_window7_224_22k.pth', **_22K, **_SMALL),
    ],
)
register(
    'swin_base_patch4_window7_224',
    Swin,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    window_size=7,
    dense=dict(always_shift=True),
    drop_path=0.5,
    weights=[
        weights('ms_in1k', _URL + 'v1.0.0/swin_base_patch4_window7_224.pth', top1=83.5, **_BASE),
        weights('ms_in22k_ft_in1k', _URL + 'v1.0.0/swin_base_patch4_window7_224_22kto1k.pth', top1=85.2, **_BASE),
        weights('ms_in22k', _URL + 'v1.0.0/swin_base_patch4_window7_224_22k.pth', **_22K, **_BASE),
    ],
)
register(
    'swin_base_patch4_window12_384',
    Swin,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    window_size=12,
    dense=dict(always_shift=True),
    drop_path=0.5,
    weights=[
        weights('ms_in1k', _URL + 'v1.0.0/swin_base_patch4_window12_384.pth', top1=84.5, **_BASE_384),
        weights('ms_in22k_ft_in1k', _URL + 'v1.0.0/swin_base_patch4_window12_384_22kto1k.pth', top1=86.4, **_BASE_384),
        weights('ms_in22k', _URL + 'v1.0.0/swin_base_patch4_window12_384_22k.pth', **_22K, **_BASE_384),
    ],
)
register(
    'swin_large_patch4_window7_224',
    Swin,
    depths=(2, 2, 18, 2),
    dims=(192, 384, 768, 1536),
    num_heads=(6, 12, 24, 48),
    window_size=7,
    dense=dict(always_shift=True),
    drop_path=0.2,
    weights=[
        weights('ms_in22k_ft_in1k', _URL + 'v1.0.0/swin_large_patch4_window7_224_22kto1k.pth', top1=86.3, **_LARGE),
        weights('ms_in22k', _URL + 'v1.0.0/swin_large_patch4_window7_224_22k.pth', **_22K, **_LARGE),
    ],
)
register(
    'swin_large_patch4_window12_384',
    Swin,
    depths=(2, 2, 18, 2),
    dims=(192, 384, 768, 1536),
    num_heads=(6, 12, 24, 48),
    window_size=12,
    dense=dict(always_shift=True),
    drop_path=0.2,
    weights=[
        weights(
            'ms_in22k_ft_in1k', _URL + 'v1.0.0/swin_large_patch4_window12_384_22kto1k.pth', top1=87.3, **_LARGE_384
        ),
        weights('ms_in22k', _URL + 'v1.0.0/swin_large_patch4_window12_384_22k.pth', **_22K, **_LARGE_384),
    ],
)
