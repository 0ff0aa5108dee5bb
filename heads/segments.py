"""Universal targets: a picture described by class and by object at once, for panoptic, semantic and instance heads.

There are K classes, some of them things (countable objects), the others stuff; `things` are class ids, in any order.

Target, as `densezoo.data.PanopticFolder` and `CocoPanoptic` give it: torchvision's instances and a semantic map.
    mask      (H, W) int64     class of every pixel, 0..K-1, things included; 255 where nothing is known
    masks     (N, H, W) bool   objects of thing classes; where two overlap the later one counts
    labels    (N,) int64       their classes: ids of the same K classes
    boxes     (N, 4) float32   xyxy in pixels
    iscrowd   (N,) int64       1 marks a group: no training target, and neither hit nor miss (optional)
The dataset's metainfo holds `classes` and `palette` (K entries each) and `things`.

Result of a panoptic head, at the picture's original size:
    panoptic         (H, W) int64   number of the segment, 1..S; 0 where there is none
    segment_labels   (S,) int64     classes of the segments 1, 2, ..., S; a stuff class has at most one
    segment_scores   (S,) float     (optional)
and where the head gives them `mask` (semantic) and `boxes`, `labels`, `scores`, `masks` (instances) as other heads do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pyramid import choose

KINDS = ('panoptic', 'instance', 'semantic')
IGNORE = 255


class PanopticMap(NamedTuple):
    """ids (H, W) int64: number of the segment, 1..S, 0 for none; labels (S,) int64; crowd (S,) bool."""

    ids: Tensor
    labels: Tensor
    crowd: Tensor


def segments(target: Mapping[str, Any], *, things: Sequence[int], kind: str = 'panoptic') -> tuple[Tensor, Tensor]:
    """What a universal head learns from a target: classes (S,) int64 and masks (S, H, W) bool, S >= 0, none empty.

    Args:
        target: see the top of this file.
        things: class ids.
        kind: 'panoptic': every object, and one mask per stuff class; 'instance': every object; 'semantic': one mask per
            class, objects of a class together. Crowds are left out, except as pixels of their class in 'semantic'.
    """
    choose('kind', kind, KINDS)
    mask = target['mask']
    if kind == 'semantic':
        return _per_class(mask, mask[mask != IGNORE].unique())
    labels, masks = _objects(target, things)
    single = ~_crowd(target, labels) & masks.flatten(1).any(1)
    labels, masks = labels[single], masks[single]
    if kind == 'instance':
        return labels, masks
    stuff_labels, stuff = _per_class(mask, _stuff(mask, things))
    return torch.cat([labels, stuff_labels]), torch.cat([masks, stuff])


def panoptic_map(target: Mapping[str, Any], *, things: Sequence[int]) -> PanopticMap:
    """The truth as one map: objects (crowds too), then a segment per stuff class; a thing's pixels without an object
    and pixels where nothing is known are 0."""
    mask = target['mask']
    labels, masks = _objects(target, things)
    crowd = _crowd(target, labels)
    number = torch.arange(1, len(labels) + 1, device=mask.device)[:, None, None]
    ids = (masks * number).amax(0) if len(labels) else torch.zeros_like(mask)
    stuff = _stuff(mask, things)
    for i, label in enumerate(stuff):
        ids = torch.where((ids == 0) & (mask == label), len(labels) + 1 + i, ids)
    labels = torch.cat([labels, stuff])
    crowd = torch.cat([crowd, torch.zeros_like(stuff, dtype=torch.bool)])
    # What is hidden altogether is no segment.
    found = ids.flatten().bincount(minlength=len(labels) + 1)[1:] > 0
    renumbered = torch.cat([found.new_zeros(1, dtype=torch.int64), found.cumsum(0) * found])
    return PanopticMap(renumbered[ids], labels[found], crowd[found])


def _objects(target: Mapping[str, Any], things: Sequence[int]) -> tuple[Tensor, Tensor]:
    mask, labels, masks = target['mask'], target['labels'], target['masks']
    if masks.shape != (len(labels), *mask.shape):
        raise ValueError(
            f'masks must be (N, H, W) with one label each and the size of mask {tuple(mask.shape)}, got '
            f'{tuple(masks.shape)} for {len(labels)} labels'
        )
    wrong = ~torch.isin(labels, torch.tensor(list(things), dtype=labels.dtype, device=labels.device))
    if wrong.any():
        raise ValueError(f'labels of objects must be things {tuple(things)}, got {int(labels[wrong][0])}')
    return labels, masks.bool()


def _crowd(target: Mapping[str, Any], labels: Tensor) -> Tensor:
    crowd = target.get('iscrowd')
    return torch.zeros_like(labels, dtype=torch.bool) if crowd is None else crowd.bool()


def _stuff(mask: Tensor, things: Sequence[int]) -> Tensor:
    present = mask[mask != IGNORE].unique()
    return present[~torch.isin(present, torch.tensor(list(things), dtype=present.dtype, device=present.device))]


def _per_class(mask: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    return classes, mask[None] == classes[:, None, None]
