"""Semantic segmentation: IoU, accuracies and a boundary F-score, from per-image counts."""

from typing import Any, NamedTuple

import numpy as np

from .base import Metric
from .boundary import boundary_f, checked_masks, radius_of


class _Counts(NamedTuple):
    """One image: non-zero cells of its confusion matrix (truth * K + prediction), and the boundary F of its classes."""

    cells: np.ndarray
    pixels: np.ndarray
    classes: np.ndarray
    boundary: np.ndarray


class SegmentationMetric(Metric):
    """'mIoU', 'mAcc', 'aAcc', 'boundary_F' (0..1).

    With n[t, p] the pixels of truth t predicted as p, over the whole dataset and without ignored pixels:
    IoU_c = n[c, c] / (sum_p n[c, p] + sum_t n[t, c] - n[c, c]), averaged over the classes that occur in the truth or in
    a prediction; Acc_c = n[c, c] / sum_p n[c, p], averaged over the classes of the truth; aAcc = trace / sum.

    boundary_F (Csurka et al., BMVC 2013): a boundary pixel of class c has one of its 4 neighbours in another
    class, ignored pixels and the picture's rim apart. Precision is the share of predicted boundary pixels at most `tau`
    pixels from a true one, recall the reverse, F their harmonic mean, for each class and image in which either has a
    boundary; averaged over the images of a class, then over classes. BoundaryMetric takes several tolerances.

    Results need `mask` (H, W) class ids, targets `mask` (H, W) of the same size.

    Args:
        num_classes: K; taken from the dataset's classes when not given.
        ignore_index: label of pixels that do not count.
        boundary_tolerance: tau as a fraction of the picture's diagonal (at least 1 pixel); None leaves boundary_F out.
        classwise: also report 'IoU/<class name>'.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        ignore_index: int = 255,
        boundary_tolerance: float | None = 0.0075,
        classwise: bool = False,
    ) -> None:
        super().__init__()
        if boundary_tolerance is not None and not 0 <= boundary_tolerance < 1:
            raise ValueError(
                f'boundary_tolerance must be a fraction of the diagonal in [0, 1) or None, got {boundary_tolerance=}'
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.boundary_tolerance = boundary_tolerance
        self.classwise = classwise

    def measure(self, image: Any, target: dict[str, Any], result: dict[str, Any]) -> _Counts:
        """Counts of one image."""
        classes = self._classes()
        truth, found, valid = checked_masks(target, result, classes, self.ignore_index)
        cells, pixels = np.unique(truth[valid] * classes + found[valid], return_counts=True)
        labels, scores = [], []
        if self.boundary_tolerance is not None:
            radius = radius_of(self.boundary_tolerance, truth.shape)
            for label in np.union1d(truth[valid], found[valid]):
                score = boundary_f(truth == label, found == label, valid, radius)
                if score is not None:
                    labels.append(label)
                    scores.append(score)
        return _Counts(cells, pixels, np.array(labels, dtype=np.int64), np.array(scores, dtype=np.float64))

    def summarise(self, measurements: list[_Counts]) -> dict[str, float]:
        """Sum the matrices, average the boundary scores."""
        classes = self._classes()
        flat = np.zeros(classes * classes, dtype=np.int64)
        boundary_sum, boundary_images = np.zeros(classes), np.zeros(classes)
        for counts in measurements:
            flat[counts.cells] += counts.pixels
            boundary_sum[counts.classes] += counts.boundary
            boundary_images[counts.classes] += 1
        matrix = flat.reshape(classes, classes)
        right, truth, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        union = truth + found - right
        metrics = {
            'mIoU': _mean_ratio(right, union),
            'mAcc': _mean_ratio(right, truth),
            'aAcc': float(right.sum() / max(matrix.sum(), 1)),
        }
        if self.boundary_tolerance is not None:
            metrics['boundary_F'] = _mean_ratio(boundary_sum, boundary_images)
        if self.classwise:
            names = (self.dataset_meta or {}).get('classes', range(classes))
            for name, part, whole in zip(names, right, union, strict=True):
                metrics[f'IoU/{name}'] = float(part / whole) if whole else -1.0
        return metrics

    def _classes(self) -> int:
        if self.num_classes is None and not (self.dataset_meta or {}).get('classes'):
            raise ValueError("SegmentationMetric needs num_classes= or dataset_meta['classes']")
        return self.num_classes or len((self.dataset_meta or {})['classes'])


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> float:
    """Mean of part / whole over the entries where whole is not 0; 0 if there is none."""
    some = whole > 0
    return float((part[some] / whole[some]).mean()) if some.any() else 0.0
