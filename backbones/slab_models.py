"""SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch Normalization,
arXiv 2405.11582.

Written from the paper and the facts of the authors' code, https://github.com/xinghaochen/SLAB (no licence is stated,
for the weights neither): Swin, PVT, CSWin and DeiT with batch norm that training reaches from LayerNorm
(`layers.rep_norm`, `train.hooks.NormSchedule`) and with linear attention in early stages (`slab`). Differs: published
classifiers take one image size, see `slab`; merging the norms for deployment (`layers.fold_norm`) keeps the product of
alpha and the stem's bias, which the authors' drops.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .backbone import rename
from .cswin import CSWin
from .deit import DeiT
from .layers import PRepBN
from .layers.rep_norm import flatten_prepbn
from .pvt import PVT
from .registry import register, weights
from .sizes import Resampled
from .swin import Swin


class SlabSwin(Swin):
    """Swin with PRepBN throughout and linear attention over large windows in early stages."""

    reduced: ClassVar[dict[str, Any]] = {**Swin.reduced, 'norm': 'repbn'}  # all of it has gradients at any iteration

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return super().convert(flatten_prepbn(state))


class RepSwin(SlabSwin):
    """Swin whose published classifier holds RepBN alone; its dense form, which is trained on, has new LayerNorms."""

    def assemble(self, **parts: Any) -> None:
        super().assemble(**parts)
        fresh = tuple(f'{name}.layer_norm.' for name, module in self.named_modules() if isinstance(module, PRepBN))
        if self.features_only:
            self.new_in_dense = (*type(self).new_in_dense, *fresh)  # type: ignore[misc]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As in `Hierarchical`; what is new in dense form learns like a head."""
        matcher = super().group_matcher(coarse)
        if self.features_only:
            old = r'(?!.*\.layer_norm\.)'
            matcher['stem'] = old + matcher['stem']
            matcher['blocks'] = [(old + pattern, depth) for pattern, depth in matcher['blocks']]
            matcher['head'] += r'|.*\.layer_norm\.'
        return matcher


class SlabPVT(PVT):
    """PVT with PRepBN throughout, without class token, with linear attention or attention to smaller maps."""

    sizes = Resampled(how='position embeddings and encodings, bilinearly')
    reduced: ClassVar[dict[str, Any]] = {**PVT.reduced, 'norm': 'repbn', 'embed_norm': 'repbn'}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return super().convert(flatten_prepbn(state))


class SlabCSWin(CSWin):
    """CSWin with PRepBN throughout and linear attention to the whole map in early stages."""

    sizes = Resampled(how='position encodings, bilinearly')
    reduced: ClassVar[dict[str, Any]] = {**CSWin.reduced, 'split_size': (None, None, 2, None), 'norm': 'repbn'}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return super().convert(flatten_prepbn(state))


class SlabDeiT(DeiT):
    """DeiT with RepBN or PRepBN throughout; with linear attention it has no class token."""

    sizes = Resampled(how='position tables bicubically, position encodings bilinearly')
    reduced: ClassVar[dict[str, Any]] = {**DeiT.reduced, 'norm': 'repbn'}

    def assemble(self, **parts: Any) -> None:
        super().assemble(**parts)
        if not self.prefix_names:  # in the published weights, and never used
            self.cls_token = nn.Parameter(torch.zeros(1, 1, parts['dim']), requires_grad=False)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names; linear attention is a mixer of maps."""
        linear = any(key.endswith('.attn.positional_encoding') for key in state)
        inside = [(r'blocks\.(\d+)\.attn\.', r'blocks.\1.attn.mixer.')] if linear else []
        return rename(super().convert(flatten_prepbn(state)), inside)


_URL = 'https://github.com/xinghaochen/SLAB/releases/download/ckpts/'


def _published(name: str, top1: float | None, params: float, file: bool = True, **cfg: Any) -> list[Any]:
    """One set of weights; parameters in 1e6 are counted, `file=False`: it was never published."""
    return [
        weights(
            'in1k',
            f'{_URL}{name}.pth' if file else None,
            top1=top1,
            params=params,
            macs=None,
            crop_pct=0.875,
            paper='https://arxiv.org/abs/2405.11582',
            origin='https://github.com/xinghaochen/SLAB',
            licence='not stated',
            **cfg,
        )
    ]


_SWIN: dict[str, Any] = {
    'window_size': (56, 28, 7, 7),
    'mixers': ('sla', 'sla', 'window', 'window'),
    'norm': 'prepbn_eps5',
    'dense': dict(always_shift=True, output_norm='layer_eps5'),
}
_NARROW: dict[str, Any] = {'dims': (96, 192, 384, 768), 'num_heads': (3, 6, 12, 24)}

register(
    'slab_swin_tiny',
    SlabSwin,
    depths=(2, 2, 6, 2),
    **_NARROW,
    **_SWIN,
    drop_path=0.2,
    weights=_published('slab_swin_tiny', 81.8, 29.2),
)
register(
    'slab_swin_small',
    SlabSwin,
    depths=(2, 2, 18, 2),
    **_NARROW,
    **_SWIN,
    drop_path=0.3,
    weights=_published('slab_swin_small', 83.6, 50.6),
)
register(
    'slab_swin_base',
    SlabSwin,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    **_SWIN,
    drop_path=0.5,
    weights=_published('slab_swin_base', None, 89.0, file=False),
)
register(
    'swin_tiny_prepbn',
    RepSwin,
    depths=(2, 2, 6, 2),
    **_NARROW,
    norm='repbn',
    dense=dict(always_shift=True, norm='prepbn_eps5', output_norm='layer_eps5'),
    drop_path=0.1,
    weights=_published('swin_tiny_prepbn', 81.4, 28.3),
)

_PVT: dict[str, Any] = {'norm': 'prepbn', 'embed_norm': 'prepbn', 'class_token': False, 'final_norm': False}

register(
    'pvt_tiny_prepbn',
    SlabPVT,
    depths=(2, 2, 2, 2),
    **_PVT,
    weights=_published('pvt_tiny_prepbn', 76.0, 13.2),
)
register(
    'pvt_small_prepbn',
    SlabPVT,
    depths=(3, 4, 6, 3),
    **_PVT,
    drop_path=0.1,
    weights=_published('pvt_small_prepbn', 80.1, 24.5),
)
register(
    'pvt_medium_prepbn',
    SlabPVT,
    depths=(3, 4, 18, 3),
    **_PVT,
    drop_path=0.3,
    weights=_published('pvt_medium_prepbn', 81.7, 44.2),
)
register(
    'slab_pvt_tiny',
    SlabPVT,
    depths=(2, 2, 2, 2),
    mixers='reduced_sla',
    sr_ratios=1,
    **_PVT,
    weights=_published('slab_pvt_tiny', 76.5, 12.2),
)
register(
    'slab_pvt_small',
    SlabPVT,
    depths=(3, 4, 6, 3),
    mixers='reduced_sla',
    sr_ratios=1,
    **_PVT,
    drop_path=0.1,
    weights=_published('slab_pvt_small', None, 21.7, file=False),
)
register(
    'slab_pvt_medium',
    SlabPVT,
    depths=(3, 4, 18, 3),
    mixers='reduced_sla',
    sr_ratios=1,
    **_PVT,
    drop_path=0.3,
    weights=_published('slab_pvt_medium', None, 37.3, file=False),
)

_CSWIN: dict[str, Any] = {
    'split_size': (None, None, 7, None),
    'mixers': ('linear_stripe', 'linear_stripe', 'stripe', 'stripe'),
    'norm': 'prepbn_eps5',
}

register(
    'slab_cswin_tiny',
    SlabCSWin,
    depths=(2, 4, 18, 1),
    **_CSWIN,
    drop_path=0.1,
    weights=_published('slab_cswin_tiny', 82.8, 21.2),
)
register(
    'slab_cswin_small',
    SlabCSWin,
    depths=(2, 4, 32, 2),
    **_CSWIN,
    drop_path=0.3,
    weights=_published('slab_cswin_small', None, 35.5, file=False),
)

_DEIT: dict[str, Any] = {'first_conv': 'patch_embed.conv'}
_LINEAR: dict[str, Any] = {
    'token_mixer': {'name': 'map', 'mixer': 'sla'},
    'norm': 'prepbn',
    'class_token': False,
}

register(
    'deit_tiny_prepbn',
    SlabDeiT,
    dim=192,
    num_heads=3,
    norm='repbn',
    weights=_published('deit_tiny_prepbn', 73.6, 5.7, **_DEIT),
)
register(
    'deit_small_prepbn',
    SlabDeiT,
    dim=384,
    num_heads=6,
    norm='prepbn',
    weights=_published('deit_small_prepbn', 80.2, 22.1, **_DEIT),
)
register(
    'slab_deit_tiny',
    SlabDeiT,
    dim=192,
    num_heads=3,
    **_LINEAR,
    weights=_published('slab_deit_tiny', 74.3, 6.2, **_DEIT),
)
register(
    'slab_deit_small',
    SlabDeiT,
    dim=384,
    num_heads=6,
    **_LINEAR,
    weights=_published('slab_deit_small', 80.0, 23.0, **_DEIT),
)
