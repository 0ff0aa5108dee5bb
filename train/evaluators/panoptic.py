"""Panoptic quality, counted as panopticapi does (Kirillov et al. 2019, arXiv:1801.00868; panopticapi: BSD-2-Clause).

A found and a true segment of one class match where their IoU exceeds 1/2, which at most one of each can; pixels of the
found segment where nothing is known are left out of the union. Per class, over all images:

    SQ = mean IoU of the matches    RQ = TP / (TP + FP / 2 + FN / 2)    PQ = SQ RQ

A found segment is no false positive if more than half of it lies where nothing is known or in a crowd of its class; a
crowd is never matched and never missed. As there, of several crowds of one class in an image the last one counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...heads.segments import panoptic_map
from .base import Metric


class _Counts(NamedTuple):
    """One image: (K,) sums of the IoU of matches, and numbers of matches, false positives and misses."""

    iou: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


class PanopticMetric(Metric):
    """'panoptic/PQ', 'panoptic/SQ', 'panoptic/RQ' (0..1), and the same with '_things' and '_stuff' behind: means over
    the classes that occur in the truth or as a false positive; 0 where none does.

    Targets and results: see `densezoo.heads.segments`; results need `panoptic` (H, W) and `segment_labels` (S,),
    targets `mask`, `masks`, `labels` of the same size.

    Args:
        things: class ids of the things; taken from the dataset's `things` when not given.
        num_classes: K; taken from the dataset's `classes` when not given.
        classwise: also report 'PQ/<class name>'; -1 for a class that does not occur.
    """

    def __init__(
        self, *, things: Sequence[int] | None = None, num_classes: int | None = None, classwise: bool = False
    ) -> None:
        super().__init__()
        self.things = None if things is None else tuple(things)
        self.num_classes = num_classes
        self.classwise = classwise

    def measure(self, image: Any, target: dict[str, Any], result: dict[str, Any]) -> _Counts:
        """Counts of one image."""
        classes, file = self._classes(), target.get('file', 'image')
        found = torch.as_tensor(result['panoptic']).detach().cpu().numpy().astype(np.int64)
        labels = torch.as_tensor(result['segment_labels']).detach().cpu().numpy().astype(np.int64)
        truth = panoptic_map({name: _on_cpu(value) for name, value in target.items()}, things=self._things())
        ids, true_labels, crowd = (part.numpy() for part in truth)
        if ids.shape != found.shape:
            raise ValueError(f'{file}: the panoptic map has size {found.shape}, the truth {ids.shape}')
        if found.size and not 0 <= found.min() <= found.max() <= len(labels):
            raise ValueError(
                f'{file}: panoptic must hold 0..{len(labels)}, as many segments as segment_labels, '
                f'got {found.min()}..{found.max()}'
            )
        for name, values in (('truth', true_labels), ('prediction', labels)):
            if values.size and not 0 <= values.min() <= values.max() < classes:
                raise ValueError(
                    f'{file}: class ids of the {name} must be 0..{classes - 1}, got {values.min()}..{values.max()}'
                )
        return count(ids, true_labels, crowd, found, labels, classes)

    def summarise(self, measurements: list[_Counts]) -> dict[str, float]:
        """Sum the counts, then average over classes."""
        iou, tp, fp, fn = (np.sum([m[i] for m in measurements], axis=0) for i in range(4))
        some = tp + fp + fn > 0
        rq = tp / np.where(some, tp + fp / 2 + fn / 2, 1)
        sq = iou / np.maximum(tp, 1)
        thing = np.isin(np.arange(len(iou)), self._things())
        metrics = {}
        for ending, chosen in (('', some), ('_things', some & thing), ('_stuff', some & ~thing)):
            for name, values in (('PQ', sq * rq), ('SQ', sq), ('RQ', rq)):
                metrics[f'panoptic/{name}{ending}'] = float(values[chosen].mean()) if chosen.any() else 0.0
        if self.classwise:
            names = (self.dataset_meta or {}).get('classes', range(len(iou)))
            for name, value, occurs in zip(names, sq * rq, some, strict=True):
                metrics[f'PQ/{name}'] = float(value) if occurs else -1.0
        return metrics

    def _things(self) -> tuple[int, ...]:
        things = self.things if self.things is not None else (self.dataset_meta or {}).get('things')
        if things is None:
            raise ValueError("PanopticMetric needs things= or dataset_meta['things']")
        return tuple(int(label) for label in things)

    def _classes(self) -> int:
        if self.num_classes is None and not (self.dataset_meta or {}).get('classes'):
            raise ValueError("PanopticMetric needs num_classes= or dataset_meta['classes']")
        return self.num_classes or len((self.dataset_meta or {})['classes'])


def count(
    truth: np.ndarray,
    true_labels: np.ndarray,
    crowd: np.ndarray,
    found: np.ndarray,
    labels: np.ndarray,
    classes: int,
) -> _Counts:
    """Matches of two maps (H, W) of segment numbers; segment n has the class labels[n - 1], 0 is no segment.

    Args:
        truth, true_labels, crowd: map, (S,) classes and (S,) bool of the truth.
        found, labels: map and (P,) classes of the prediction; a number without a pixel is no segment.
        classes: K.
    """
    rows, columns = len(true_labels) + 1, len(labels) + 1
    pairs = (truth * columns + found).ravel()
    common = np.bincount(pairs, minlength=rows * columns).reshape(rows, columns).astype(np.float64)
    true_area, area, unknown = common.sum(1)[1:], common.sum(0)[1:], common[0, 1:]
    common = common[1:, 1:]
    iou = common / np.maximum(true_area[:, None] + (area - unknown)[None] - common, 1)
    match = (iou > 0.5) & ~crowd[:, None] & (true_labels[:, None] == labels[None])
    true_index, index = match.nonzero()

    # A segment may lie in the unknown, and in the last crowd of its class.
    beyond = unknown.copy()
    last_crowd = {int(true_labels[i]): i for i in crowd.nonzero()[0]}
    for j, label in enumerate(labels):
        if int(label) in last_crowd:
            beyond[j] += common[last_crowd[int(label)], j]
    wrong = (area > 0) & ~match.any(0) & (beyond <= 0.5 * area)
    missed = ~crowd & ~match.any(1)
    return _Counts(
        np.bincount(true_labels[true_index], iou[true_index, index], minlength=classes),
        np.bincount(true_labels[true_index], minlength=classes),
        np.bincount(labels[wrong], minlength=classes),
        np.bincount(true_labels[missed], minlength=classes),
    )


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
