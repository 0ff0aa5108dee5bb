"""What a head knows of its backbone: channels and strides per level, read from `feature_info`, and nothing else.

A feature pyramid is a list of maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), finest first. The padded size of the batch
is read back from the first map; the valid size of each picture comes separately as `sizes`.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

Size = tuple[int, int]


@runtime_checkable
class FeatureInfo(Protocol):
    """timm's FeatureInfo, a PyramidInfo, or anything else with these two methods."""

    def channels(self) -> list[int]: ...

    def reduction(self) -> list[int]: ...


class PyramidInfo:
    """Channels and strides of a list of feature maps, finest first, in timm's form.

    Args:
        channels: channels of each map.
        reduction: stride of each map in input pixels, rising.
    """

    def __init__(self, channels: Sequence[int], reduction: Sequence[int]):
        self._channels = [int(c) for c in channels]
        self._reduction = [int(s) for s in reduction]
        if not self._channels or len(self._channels) != len(self._reduction):
            raise ValueError(f'feature_info needs one stride per map, and a map, got {channels=}, {reduction=}')
        if min(self._channels) < 1 or min(self._reduction) < 1:
            raise ValueError(f'feature_info needs positive channels and strides, got {channels=}, {reduction=}')
        if any(a >= b for a, b in zip(self._reduction, self._reduction[1:])):
            raise ValueError(f'feature_info needs rising strides (finest map first), got {reduction=}')

    @classmethod
    def of(cls, feature_info: FeatureInfo) -> 'PyramidInfo':
        """A checked copy of any feature_info (TypeError for anything without channels() and reduction())."""
        if not all(callable(getattr(feature_info, name, None)) for name in ('channels', 'reduction')):
            raise TypeError(
                'feature_info must have channels() and reduction(), as that of create_model(..., '
                f'features_only=True) has, got {type(feature_info).__name__}'
            )
        return cls(feature_info.channels(), feature_info.reduction())

    def channels(self) -> list[int]:
        return list(self._channels)

    def reduction(self) -> list[int]:
        return list(self._reduction)

    def __len__(self) -> int:
        return len(self._channels)

    def __repr__(self) -> str:
        return f'PyramidInfo(channels={self._channels}, reduction={self._reduction})'

    def check(self, features: Sequence[Tensor]) -> None:
        """ValueError unless `features` are as many maps, with as many channels, as declared."""
        if isinstance(features, Tensor) or [f.shape[1] for f in features] != self._channels:
            got = tuple(features.shape) if isinstance(features, Tensor) else [f.shape[1] for f in features]
            raise ValueError(f'features must be a list of maps with channels {self._channels}, got {got}')

    def padded_size(self, features: Sequence[Tensor]) -> Size:
        """(H, W) of the padded batch that these maps were computed from, rounded up to the first stride."""
        height, width = features[0].shape[-2:]
        return height * self._reduction[0], width * self._reduction[0]

    def same_channels(self, head: str) -> int:
        """The one width of all maps (ValueError when they differ: the head shares its towers over the levels)."""
        if len(set(self._channels)) != 1:
            raise ValueError(f'{head} needs maps of one width, got channels={self._channels}; put an FPN before it')
        return self._channels[0]


def choose(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if allowed, else a ValueError that names the nearest allowed one."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'{name} must be one of {tuple(allowed)}, got {value!r}{hint}')
    return value


def positive(name: str, value: int) -> int:
    """`value` if it is at least 1, else a ValueError."""
    if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    return value


def norm_layer(norm: str) -> Callable[[int], nn.Module] | None:
    """'none' -> None, 'group' -> GroupNorm of 32 groups (fewer on narrow maps), 'batch' -> BatchNorm2d."""
    choose('norm', norm, ('none', 'group', 'batch'))
    if norm == 'none':
        return None
    return nn.BatchNorm2d if norm == 'batch' else partial(_group_norm, 32)


def _group_norm(groups: int, channels: int) -> nn.GroupNorm:
    if channels % groups or channels == groups:
        # At least two channels in a group: one value of a 1x1 map cannot be normalised, and PyTorch refuses it.
        groups = math.gcd(groups, max(1, channels // 2))
    return nn.GroupNorm(groups, channels)


def check_sizes(sizes: Sequence[Size], batch: int, padded: Size, original_sizes: Sequence[Size] | None) -> None:
    """ValueError unless there is one valid size, inside the padded batch, for each picture."""
    if len(sizes) != batch or (original_sizes is not None and len(original_sizes) != batch):
        raise ValueError(
            f'sizes and original_sizes need one (h, w) per picture, got {len(sizes)} and '
            f'{None if original_sizes is None else len(original_sizes)} for a batch of {batch}'
        )
    for index, (height, width) in enumerate(sizes):
        if not (0 < height <= padded[0] and 0 < width <= padded[1]):
            raise ValueError(f'sizes[{index}] must lie inside the padded batch {tuple(padded)}, got {(height, width)}')
