"""Boundary F-score: how well the outlines of the classes lie where they should, apart from the areas inside.

What is a good evaluation measure for semantic segmentation? (Csurka et al., BMVC 2013), with the tolerances in pixels
or as fractions of the diagonal; Gated-SCNN (arXiv:1907.05740) reports 0.00088, 0.001875, 0.00375 and 0.005.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from .base import Metric

ANY = -1  # stands for "of any class": outlines alone, whatever they enclose


class BoundaryScores(NamedTuple):
    """Precision, recall and F of one class in one image."""

    precision: float
    recall: float
    f: float


class BoundaryMetric(Metric):
    """'boundary/F@<t>', 'boundary/precision@<t>', 'boundary/recall@<t>' and 'boundary/F_any@<t>' (0..1), per tolerance.

    A boundary pixel of class c has one of its 4 neighbours in another class, unknown pixels and the picture's rim
    apart. Precision is the share of found boundary pixels at most t from a true one, recall the reverse, F their
    harmonic mean, for each class and image in which either has a boundary; averaged over the images of a class, then
    over classes. 'F_any' takes the boundaries between any classes together, so that a wrong name costs nothing.

    Results need `mask` (H, W) class ids, targets `mask` (H, W) of the same size.

    Args:
        tolerances: t in pixels (whole numbers from 1), or as fractions of the diagonal (below 1; at least one pixel).
        num_classes: K; taken from the dataset's classes when not given.
        ignore_index: label of pixels that do not count.
        classwise: also report 'boundary_F@<t>/<class name>'; -1 for a class without a boundary.
    """

    def __init__(
        self,
        *,
        tolerances: Sequence[float] = (1, 2, 3),
        num_classes: int | None = None,
        ignore_index: int = 255,
        classwise: bool = False,
    ) -> None:
        super().__init__()
        if not tolerances or any(t <= 0 or (t >= 1 and t != int(t)) for t in tolerances):
            raise ValueError(
                f'tolerances must be whole pixels from 1 or fractions of the diagonal below 1, got {tuple(tolerances)}'
            )
        self.tolerances = tuple(tolerances)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.classwise = classwise

    def measure(self, image: Any, target: dict[str, Any], result: dict[str, Any]) -> dict[int, list[BoundaryScores]]:
        """Scores per class (and ANY) that has a boundary, one per tolerance."""
        truth, found, valid = checked_masks(target, result, self._classes(), self.ignore_index)
        radii = [radius_of(tolerance, truth.shape) for tolerance in self.tolerances]
        scores = {}
        for label in np.union1d(truth[valid], found[valid]).tolist():
            edges = [boundary(mask == label, valid) for mask in (truth, found)]
            if any(edge.any() for edge in edges):
                scores[int(label)] = [compare(edges[0], edges[1], radius) for radius in radii]
        edges = [any_boundary(mask, valid) for mask in (truth, found)]
        if any(edge.any() for edge in edges):
            scores[ANY] = [compare(edges[0], edges[1], radius) for radius in radii]
        return scores

    def summarise(self, measurements: list[dict[int, list[BoundaryScores]]]) -> dict[str, float]:
        """Means over images, then over classes."""
        classes = self._classes()
        names = list((self.dataset_meta or {}).get('classes', range(classes)))
        metrics = {}
        for i, tolerance in enumerate(self.tolerances):
            means = {
                label: np.mean([m[label][i] for m in measurements if label in m], axis=0)
                for label in (*range(classes), ANY)
                if any(label in m for m in measurements)
            }
            every = [mean for label, mean in means.items() if label != ANY]
            precision, recall, f = np.mean(every, axis=0) if every else (0.0, 0.0, 0.0)
            metrics[f'boundary/F@{tolerance:g}'] = float(f)
            metrics[f'boundary/precision@{tolerance:g}'] = float(precision)
            metrics[f'boundary/recall@{tolerance:g}'] = float(recall)
            metrics[f'boundary/F_any@{tolerance:g}'] = float(means[ANY][2]) if ANY in means else 0.0
            if self.classwise:
                for label, name in enumerate(names):
                    metrics[f'boundary_F@{tolerance:g}/{name}'] = float(means[label][2]) if label in means else -1.0
        return metrics

    def _classes(self) -> int:
        if self.num_classes is None and not (self.dataset_meta or {}).get('classes'):
            raise ValueError("BoundaryMetric needs num_classes= or dataset_meta['classes']")
        return self.num_classes or len((self.dataset_meta or {})['classes'])


def checked_masks(
    target: dict[str, Any], result: dict[str, Any], classes: int, ignore_index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth and prediction (H, W) int64, and where the truth is known; ValueError for other sizes or class ids."""
    truth = torch.as_tensor(target['mask']).detach().cpu().numpy().astype(np.int64)
    found = torch.as_tensor(result['mask']).detach().cpu().numpy().astype(np.int64)
    file = target.get('file', 'image')
    if truth.shape != found.shape:
        raise ValueError(f'{file}: the predicted mask has size {found.shape}, the truth {truth.shape}')
    valid = truth != ignore_index
    for name, ids in (('truth', truth[valid]), ('prediction', found[valid])):
        if ids.size and not 0 <= ids.min() <= ids.max() < classes:
            raise ValueError(f'{file}: class ids of the {name} must be 0..{classes - 1}, got {ids.min()}..{ids.max()}')
    return truth, found, valid


def radius_of(tolerance: float, shape: tuple[int, ...]) -> int:
    """Pixels of a tolerance: itself from 1 on, below that a fraction of the diagonal, at least 1."""
    return int(tolerance) if tolerance >= 1 else max(1, round(tolerance * math.hypot(*shape)))


def boundary_f(truth: np.ndarray, found: np.ndarray, valid: np.ndarray, radius: int) -> float | None:
    """Boundary F-score of two boolean masks (H, W) at a tolerance of `radius` pixels; None where neither has one."""
    edges = [boundary(mask, valid) for mask in (truth, found)]
    return compare(edges[0], edges[1], radius).f if any(edge.any() for edge in edges) else None


def compare(truth: np.ndarray, found: np.ndarray, radius: int) -> BoundaryScores:
    """Scores of two uint8 maps (H, W) of boundary pixels, at least one of which holds some."""
    amounts = int(truth.sum()), int(found.sum())
    if not all(amounts):
        return BoundaryScores(0.0, 0.0, 0.0)
    across = np.arange(-radius, radius + 1)
    disc = (across[:, None] ** 2 + across**2 <= radius**2).astype(np.uint8)
    near_truth, near_found = (cv2.dilate(edge, disc) for edge in (truth, found))
    precision = float((found & near_truth).sum()) / amounts[1]
    recall = float((truth & near_found).sum()) / amounts[0]
    return BoundaryScores(
        precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    )


_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=np.uint8)


def boundary(mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """uint8 (H, W): 1 where a valid pixel of the mask has a valid neighbour outside it."""
    outside = cv2.dilate((valid & ~mask).astype(np.uint8), _CROSS)
    return (mask & valid).astype(np.uint8) & outside


def any_boundary(labels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """uint8 (H, W): 1 where a valid pixel has a valid neighbour of another class."""
    edges = np.zeros(labels.shape, dtype=np.uint8)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = (labels[one] != labels[other]) & valid[one] & valid[other]
        edges[one] |= differs
        edges[other] |= differs
    return edges
