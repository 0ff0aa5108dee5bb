"""Hierarchical families whose first stage has stride 8: what differs from `Hierarchical` for them.

The classifier has the stages of the published system. The dense form has maps of strides 4, 8, 16 and 32, as every
backbone here: those from 8 on are the first three stages' raw maps, the one of stride 4 is the first stage's after a
transposed convolution and a norm, `pyramid.0`. Stages of stride 64 are left out of it.
"""

# B batch, C channels, H W size of a map
from collections.abc import Sequence
from typing import Any, ClassVar

from timm.models import FeatureInfo
from torch import Tensor, nn

from .backbone import normalise_indices
from .layers.grid import ceil_div, to_first
from .layers.heads import HeadFactory
from .layers.norm import NormFactory
from .layers.pyramid import PyramidLevel
from .skeleton import Hierarchical, Stage


class FromStride8(Hierarchical):
    """Stages of strides 8, 16, 32 and, as classifier, perhaps 64; see the top of this file."""

    new_in_dense: ClassVar[tuple[str, ...]] = ('pyramid.',)

    def assemble_from_8(
        self,
        *,
        dims: Sequence[int],
        downsamplings: Sequence[nn.Module],
        stages: Sequence[Stage],
        norm: NormFactory,
        in_chans: int,
        num_classes: int,
        drop_rate: float,
        features_only: bool,
        out_indices: int | Sequence[int],
        head: str | HeadFactory = 'linear',
    ) -> None:
        """As `Hierarchical.assemble`, whose arguments these are; `out_indices` are levels, 0 of stride 4."""
        levels = normalise_indices(out_indices, len(self.strides)) if features_only else ()
        self._sources = tuple(max(level - 1, 0) for level in levels)  # the stage of each level
        self.assemble(
            dims=dims,
            downsamplings=downsamplings,
            stages=stages,
            output_norm=None,
            norm=norm,
            head=head,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=tuple(sorted(set(self._sources))) if features_only else 0,
        )
        info = [{'num_chs': dim, 'reduction': 8 * 2**s, 'module': f'stages.{s}'} for s, dim in enumerate(dims)]
        if features_only:
            self.out_indices = levels
            finest = PyramidLevel(dims[0], stride=8, target=4)
            self.pyramid = nn.ModuleDict({'0': finest} if 0 in levels else {})
            self.absent_keys += () if 0 in levels else ('pyramid.0.',)
            info = [{'num_chs': finest.dim, 'reduction': 4, 'module': 'pyramid.0'}, *info[:3]]
        self.feature_info = FeatureInfo(info, self.out_indices)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """As in `Hierarchical`."""
        if not self.features_only:
            return super().forward(x)
        height, width = x.shape[-2:]
        wanted = tuple(sorted(set(self._sources)))
        maps = self.forward_intermediates(x, wanted, output_fmt='NHWC', intermediates_only=True)
        by_stage = dict(zip(wanted, maps))
        return [
            to_first(
                self.pyramid['0'](by_stage[s], (ceil_div(height, 4), ceil_div(width, 4))) if i == 0 else by_stage[s]
            )
            for i, s in zip(self.out_indices, self._sources)
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), 'head': r'^(?:head|pyramid)\.'}
