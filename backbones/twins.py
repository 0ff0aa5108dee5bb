"""Twins-PCPVT and Twins-SVT: Revisiting the Design of Spatial Attention in Vision Transformers, arXiv 2104.13840.

Written from the paper and the facts of the authors' code, https://github.com/Meituan-AutoML/Twins (Apache-2.0; the
weights carry the same licence). Differs: sizes that a stride does not divide are padded where the authors' patch
embeddings drop border pixels; classifiers take sizes that windows do not divide and leave the padding out of attention.
With `polyphase` predictions do not change when images are shifted on a torus: arXiv 2306.07470, see `layers.polyphase`.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import window_attention
from .layers import ConvDownsample, MetaFormerBlock, Mlp, build_mixer, drop_path_schedule, mixer, norm_factory
from .layers.grid import padded, to_first
from .layers.linear import Linear
from .layers.lookup import choose
from .layers.polyphase import AnchoredDownsample, anchor
from .pvt_v2 import init_fan_out, resolve_heads
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage, rename

# B batch, C channels, H W size of the current stage, h heads, w window, r reduction of keys and values

# what attention in windows does with the positions that fill the last windows up
PADDING = ('mask', 'attend', 'mask_if_both')


@mixer('lsa')
class LocallyGroupedAttention(nn.Module):
    """Attention inside windows that do not overlap.

    Args:
        dim: channels.
        num_heads: attention heads; dim // 32 if None.
        window_size: side of the windows; the map is filled up to whole windows below and to the right.
        padding: 'mask' leaves the filling out of attention; 'attend' attends to it as to positions that are 0;
            'mask_if_both' is 'mask' for maps filled up below and to the right, and 'attend' for all others.
    """

    def __init__(self, *, dim: int, num_heads: int | None = None, window_size: int = 7, padding: str = 'mask'):
        super().__init__()
        if window_size < 1:
            raise ValueError(f'window_size must be positive, got {window_size=}')
        self.padding = choose('padding', padding, {name: name for name in PADDING})
        self.num_heads, self.window_size = resolve_heads(dim, num_heads), window_size
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        below, right = padded(H, self.window_size) - H, padded(W, self.window_size) - W
        qkv = self.qkv(x)
        attend = partial(window_attention, qkv, self.window_size, heads=self.num_heads)
        if isinstance(below, int) and isinstance(right, int):
            masked = {'mask': below + right, 'mask_if_both': below * right, 'attend': 0}[self.padding] > 0
            out = attend(outside=None if masked else self.qkv.bias)
        elif self.padding != 'mask_if_both':
            out = attend(outside=None if self.padding == 'mask' else self.qkv.bias)
        else:  # one graph for all sizes
            both = torch.full((), below * right, device=x.device) > 0
            out = torch.where(both, attend(outside=None), attend(outside=self.qkv.bias))
        return self.proj(out)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}, padding={self.padding!r}'


class PositionEncoding(nn.Module):
    """x + depthwise 3x3 convolution of x, which tells positions apart by what surrounds them.

    Conditional Positional Encodings for Vision Transformers, arXiv 2102.10882.

    Args:
        circular: the map continues around its borders, where otherwise zeros surround it.
    """

    def __init__(self, dim: int, *, circular: bool = False):
        super().__init__()
        self.circular = circular
        self.proj = nn.Conv2d(dim, dim, 3, padding=0 if circular else 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        around = x
        if self.circular:  # nn.Conv2d's own circular padding does not export with dynamic sizes
            around = torch.cat([around[:, -1:], around, around[:, :1]], 1)
            around = torch.cat([around[:, :, -1:], around, around[:, :, :1]], 2)
        return x + self.proj(to_first(around)).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        return f'circular={self.circular}'


class TwinsBlock(MetaFormerBlock):
    """The MetaFormer block, position encoding after the first of each stage, and anchoring before it on request.

    Args:
        position: encodes positions afterwards; None does not.
        period: side of the blocks that the mixer cuts the map into, which are to start at the polyphase component with
            the largest norm; 1 leaves the map where it is.
        The others: see `MetaFormerBlock`.
    """

    def __init__(self, *, position: nn.Module | None = None, period: int = 1, **branches: Any):
        super().__init__(**branches)
        self.pos_block = position
        self.period = period

    def forward(self, x: Tensor) -> Tensor:
        if self.period > 1:
            x = anchor(x, self.period)
        x = super().forward(x)
        return x if self.pos_block is None else self.pos_block(x)


class Twins(Hierarchical):
    """Attention in windows alternating with attention to a smaller map (SVT), or the latter alone (PCPVT).

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, sr_ratios, mlp_ratios: attention heads, reduction of keys and values and width of the MLPs over that
            of the stage; one for all stages or one per stage.
        window_size: side of the windows of blocks 0, 2, ...; None for stages without windows. One for all stages or one
            per stage.
        mixers: token mixers in place of the family's own, by name or dict(name=..., option=...); None keeps them. One
            for all stages or one per stage.
        norm: normalisation of blocks, stages and classifier, by name.
        dense: which of the authors' dense forms: 'seg' (default) or 'det'. They differ in `padding`.
        padding: what windows do with the filling of the last ones, see `LocallyGroupedAttention`. None: 'mask' for
            classifiers, 'attend' for 'det', and for 'seg' 'mask_if_both', an oversight that the published weights for
            segmentation were trained with; padding='mask' corrects it.
        stage_norms: a norm after each stage, of the map that the next stage gets too, as in SVT's dense forms.
        polyphase: predictions equal for all shifts of an image on a torus; for classifiers.
        img_size: not needed, taken for the sake of mixers that are made for one size.
        The others: see `Hierarchical.assemble`.
    """

    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 2, 2, 2),
        'dims': (32, 64, 96, 128),
        'num_heads': (1, 2, 3, 4),
        'mlp_ratios': 2.0,
    }
    new_in_dense = ('stage_norms.',)
    norm_first = True

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 10, 4),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: int | Sequence[int] = (2, 4, 8, 16),
        sr_ratios: int | Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: float | Sequence[float] = 4.0,
        window_size: int | Sequence[int | None] | None = 7,
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | None] | None = None,
        norm: str = 'layer',
        dense: str = 'seg',
        padding: str | None = None,
        stage_norms: bool = False,
        polyphase: bool = False,
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
        mixers = per_stage('mixers', mixers)
        in_dense = choose('dense', dense, {'seg': 'mask_if_both', 'det': 'attend'})
        padding = choose(
            'padding', padding or (in_dense if features_only else 'mask'), {name: name for name in PADDING}
        )
        if polyphase and features_only:
            raise ValueError(
                'polyphase moves maps by up to a stride against the image and each other, so it is for classifiers; '
                'got features_only=True'
            )
        if polyphase and any(mixers):
            raise ValueError(f"polyphase needs the family's own mixers, got {mixers=}")
        make_norm = norm_factory(norm)
        stages = []
        for dim, heads, ratio, mlp_ratio, window, spec, rates in zip(
            dims,
            per_stage('num_heads', num_heads),
            per_stage('sr_ratios', sr_ratios),
            per_stage('mlp_ratios', mlp_ratios),
            per_stage('window_size', window_size),
            mixers,
            drop_path_schedule(depths, drop_path_rate),
        ):
            blocks = []
            for i, rate in enumerate(rates):
                if window is not None and i % 2 == 0:
                    own = dict(name='lsa', num_heads=heads, window_size=window, padding=padding)
                    period = window
                else:
                    own, period = dict(name='sra', num_heads=heads, sr_ratio=ratio), ratio
                blocks.append(
                    TwinsBlock(
                        dim=dim,
                        norm=make_norm,
                        mixer=build_mixer(spec or own, dim=dim),
                        mlp=Mlp(dim=dim, ratio=mlp_ratio),
                        drop_path=rate,
                        position=PositionEncoding(dim, circular=polyphase) if i == 0 else None,
                        period=period if polyphase else 1,
                    )
                )
            stages.append(blocks)
        embed = partial(
            AnchoredDownsample if polyphase else ConvDownsample, padding=0, post_norm=norm_factory('layer_eps5')
        )
        self.assemble(
            dims=dims,
            downsamplings=[
                embed(in_chans, dims[0], kernel=4, stride=4, image=True),
                *(embed(a, b, kernel=2, stride=2) for a, b in itertools.pairwise(dims)),
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
        if stage_norms:
            self.stage_norms = nn.ModuleList(make_norm(dim) for dim in dims[: len(self.stages)])
            self.absent_keys += tuple(f'stage_norms.{s}.' for s in range(len(self.stages), 4))
            self.same_maps_in_dense = False
        self.apply(self.init_weights)

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        x = super()._run(blocks, x)
        if hasattr(self, 'stage_norms'):
            stage = next(s for s, candidate in enumerate(self.stages) if candidate is blocks)
            x = self.stage_norms[stage](x)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As in `Hierarchical`; norms after stages are new and learn with the head."""
        return {**super().group_matcher(coarse), 'head': r'^(?:head|stage_norms)\.'}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if '.pos_block.' in name}

    def init_weights(self, module: nn.Module) -> None:
        """The authors': truncated normal in linear layers, normal with deviation sqrt(2 / fan_out) in convolutions."""
        if isinstance(module, nn.Conv2d):
            init_fan_out(module)
        else:
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'patch_embeds\.(\d)\.proj\.', r'downsample_layers.\1.conv.'),
    (r'patch_embeds\.(\d)\.norm\.', r'downsample_layers.\1.post_norm.'),
    (r'blocks\.(\d)\.(\d+)\.attn\.', r'stages.\1.\2.token_mixer.'),
    (r'blocks\.', 'stages.'),
    (r'pos_block\.(\d)\.proj\.0\.', r'stages.\1.0.pos_block.proj.'),
    (r'norm_list\.', 'stage_norms.'),
]

_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2104.13840',
    'origin': 'https://github.com/Meituan-AutoML/Twins',
    'page': 'https://github.com/Meituan-AutoML/Twins#image-classification',
    'crop_pct': 0.875,
}
_PCPVT: dict[str, Any] = {
    'dims': (64, 128, 320, 512),
    'num_heads': (1, 2, 5, 8),
    'mlp_ratios': (8, 8, 4, 4),
    'window_size': None,
}
_SVT_DENSE = {'stage_norms': True}

register(
    'twins_pcpvt_small',
    Twins,
    depths=(3, 4, 6, 3),
    **_PCPVT,
    drop_path=0.2,
    weights=[weights('in1k', None, top1=81.2, params=24.1, macs=3.7, **_PAPER)],
)
register(
    'twins_pcpvt_base',
    Twins,
    depths=(3, 4, 18, 3),
    **_PCPVT,
    drop_path=0.3,
    weights=[weights('in1k', None, top1=82.7, params=43.8, macs=6.4, **_PAPER)],
)
register(
    'twins_pcpvt_large',
    Twins,
    depths=(3, 8, 27, 3),
    **_PCPVT,
    drop_path=0.5,
    weights=[weights('in1k', None, top1=83.1, params=60.9, macs=9.5, **_PAPER)],
)
register(
    'twins_svt_small',
    Twins,
    depths=(2, 2, 10, 4),
    dims=(64, 128, 256, 512),
    num_heads=(2, 4, 8, 16),
    dense=_SVT_DENSE,
    drop_path=0.2,
    weights=[weights('in1k', None, top1=81.7, params=24, macs=2.8, **_PAPER)],
)
register(
    'twins_svt_base',
    Twins,
    depths=(2, 2, 18, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    dense=_SVT_DENSE,
    drop_path=0.3,
    weights=[weights('in1k', None, top1=83.2, params=56, macs=8.3, **_PAPER)],
)
register(
    'twins_svt_large',
    Twins,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    dense=_SVT_DENSE,
    drop_path=0.5,
    weights=[weights('in1k', None, top1=83.7, params=99.2, macs=14.8, **_PAPER)],
)
