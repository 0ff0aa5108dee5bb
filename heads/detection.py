"""What the detection heads share: checked targets, anchors, batched matching, decoding of one picture's candidates.

Boxes are xyxy in pixels of the padded batch, labels 0..K-1. Targets are torchvision's dicts with `boxes` (N, 4) float
and `labels` (N,) int64, N >= 0. Matching works on the whole batch at once: all pictures of a batch share one anchor
grid, so the overlaps of all boxes with it are one matrix, spread to (B, M, N) with M the boxes of the fullest picture.

B pictures, K classes, N anchors or points of all levels, T boxes of the batch, M boxes of the fullest picture.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from ..kernels import apart
from .pyramid import PyramidInfo, Size

BACKGROUND, IGNORED = -1, -2
CANDIDATES = 1000  # that suppression in an exported graph compares with each other

# boxes (B, M, 4), scores (B, M), IoU -> which to keep (B, M): see kernels.nms
Suppress = Callable[[Tensor, Tensor, float], Tensor]


class GroundTruth(NamedTuple):
    """Boxes of a batch in one tensor; row T is a dummy that unmatched anchors point to.

    boxes (T + 1, 4) float32, labels (T + 1,) int64, counts: boxes per picture.
    """

    boxes: Tensor
    labels: Tensor
    counts: list[int]

    @property
    def real(self) -> Tensor:
        return self.boxes[:-1]

    def rows(self, matched: Tensor) -> Tensor:
        """(B, N) indices into each picture's boxes (negative: none) -> indices into `boxes` and `labels`."""
        starts = torch.tensor([0, *self.counts], device=matched.device).cumsum(0)[:-1]
        return torch.where(matched >= 0, matched + starts[:, None], len(self.boxes) - 1)


def gather_targets(targets: Sequence[Mapping[str, Any]], num_classes: int, device: torch.device) -> GroundTruth:
    """Boxes and labels of a batch; ValueError for a wrong shape or a label outside 0..K-1."""
    for i, target in enumerate(targets):
        boxes, labels = target['boxes'], target['labels']
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f'targets[{i}] needs boxes (N, 4) and labels (N,), got {tuple(boxes.shape)} and {tuple(labels.shape)}'
            )
    boxes = torch.cat([t['boxes'].to(device, torch.float32) for t in targets] + [torch.zeros(1, 4, device=device)])
    labels = torch.cat(
        [t['labels'].to(device, torch.int64) for t in targets] + [torch.zeros(1, dtype=torch.int64, device=device)]
    )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f'labels must be in 0..{num_classes - 1} (there is no background class), got '
            f'{low if low < 0 else high}; is num_classes={num_classes} right?'
        )
    return GroundTruth(boxes, labels, [len(t['boxes']) for t in targets])


class PyramidAnchors(AnchorGenerator):
    """torchvision's anchors on a pyramid: the same for every picture of a batch, computed once per batch size.

    Args:
        info: strides of the maps.
        sizes: per level, square roots of the anchors' areas in pixels.
        aspect_ratios: height / width, the same on all levels.
        offset: position of an anchor within its cell: 0 (torchvision) its top left corner, 0.5 its centre.
        exact_strides: torchvision places anchors (padded size) // (map size) pixels apart, which for maps that were
            rounded up is less than their stride (320 // 3 = 106 for stride 128); True uses the strides as declared.
        exact_sizes: torchvision rounds the corners of the anchors around 0 to whole pixels; True does not.
    """

    def __init__(
        self,
        *,
        info: PyramidInfo,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        offset: float,
        exact_strides: bool,
        exact_sizes: bool = False,
    ):
        if len(sizes) != len(info) or not all(len(level) == len(sizes[0]) > 0 for level in sizes):
            raise ValueError(f'anchor_sizes needs as many sizes on each of the {len(info)} levels, got {sizes}')
        if not aspect_ratios or min(aspect_ratios) <= 0 or min(min(level) for level in sizes) <= 0:
            raise ValueError(f'anchor_sizes and aspect_ratios must be positive, got {sizes} and {aspect_ratios}')
        if not 0 <= offset < 1:
            raise ValueError(f'anchor_offset must be in [0, 1), got {offset}')
        super().__init__(tuple(tuple(level) for level in sizes), (tuple(aspect_ratios),) * len(sizes))
        self.info, self.offset = info, offset
        self.exact_strides, self.exact_sizes = exact_strides, exact_sizes
        self._cache: dict[Any, list[Tensor]] = {}

    def per_location(self) -> int:
        return len(self.sizes[0]) * len(self.aspect_ratios[0])

    def on(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors of each level, (h * w * A, 4) float32, location-major, on the device of the maps."""
        grids = [(f.shape[-2], f.shape[-1]) for f in features]
        if torch.compiler.is_exporting():  # what is traced must not stay behind
            return self._compute(grids, self.info.padded_size(features), features[0].device)
        key = (tuple(grids), features[0].device)
        if key not in self._cache:
            if len(self._cache) >= 32:
                self._cache.clear()
            # Kept tensors must be usable in training even if the first call was an evaluation.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = self._compute(grids, self.info.padded_size(features), features[0].device)
        return self._cache[key]

    def _compute(self, grids: Sequence[Size], padded: Size, device: torch.device) -> list[Tensor]:
        cell = exact_cell if self.exact_sizes else self.generate_anchors
        cells = [cell(s, r, torch.float32, device) for s, r in zip(self.sizes, self.aspect_ratios)]
        steps = [
            (s, s) if self.exact_strides else (max(padded[0] // h, 1), max(padded[1] // w, 1))
            for s, (h, w) in zip(self.info.reduction(), grids)
        ]
        return [self._level(*level) for level in zip(cells, grids, steps)]

    def _level(self, cells: Tensor, grid: Size, step: Size) -> Tensor:
        """Cells (A, 4) around 0 -> (h * w * A, 4), moved to every position of the grid."""
        y, x = ((torch.arange(count, device=cells.device) + self.offset) * length for count, length in zip(grid, step))
        y, x = torch.meshgrid(y, x, indexing='ij')
        return (torch.stack([x, y, x, y], -1)[..., None, :] + cells).reshape(-1, 4)


def exact_cell(
    sizes: Sequence[float], aspect_ratios: Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(A, 4) anchors around 0 in torchvision's order, all sizes of one ratio after the other, not rounded."""
    root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
    size = torch.tensor(sizes, dtype=dtype, device=device)
    half = torch.stack([(size / root).flatten(), (size * root).flatten()], 1) / 2
    return torch.cat([-half, half], 1)


def level_sizes(levels: Sequence[Tensor]) -> list[int]:
    return [len(level) for level in levels]


def spread(rows: Tensor, counts: Sequence[int], fill: float) -> Tensor:
    """(T, N) rows of all pictures -> (B, M, N), missing rows filled; M is at least 1."""
    longest = max([1, *counts])
    if all(count == longest for count in counts):
        return rows.view(len(counts), longest, rows.shape[1])
    there = torch.arange(longest, device=rows.device) < torch.tensor(list(counts), device=rows.device)[:, None]
    out = rows.new_full((len(counts), longest, rows.shape[1]), fill)
    out[there] = rows
    return out


def match_by_iou(truth: GroundTruth, anchors: Tensor, *, high: float, low: float, low_quality: str = 'best') -> Tensor:
    """Boxes of a whole batch for its anchors: (B, N) int64, a box of the picture, BACKGROUND or IGNORED.

    An anchor gets its best box if their IoU is >= high, is ignored in [low, high), is background below. An anchor that
    overlaps some box as much as none of the others does is never left out: with low_quality='best' it gets its own best
    box (torchvision's Matcher), with 'box' that box, of several the last (MMDetection's MaxIoUAssigner); 'none' leaves
    it. Differs from both: a box that overlaps no anchor gets none (there it gets all).
    """
    quality = spread(box_iou(truth.real, anchors), truth.counts, -1.0)  # (B, M, N)
    best, index = quality.max(1)
    matched = torch.where(best >= high, index, torch.where(best >= low, IGNORED, BACKGROUND))
    if low_quality != 'none':
        peak = quality.amax(2, keepdim=True)
        wanted = (quality == peak) & (peak > 0)
        if low_quality == 'box':
            index = quality.shape[1] - 1 - wanted.flip(1).int().argmax(1)
        matched = torch.where(wanted.any(1), index, matched)
    return matched


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of row with row: (T, 4), (T, 4) xyxy -> (T,)."""
    inner = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    inner = inner.prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1) - inner
    return inner / union.clamp(min=1e-9)


def select_candidates(
    scores: Tensor, levels: Sequence[int], threshold: float, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (N, K) of one picture -> (anchor, label, score) of those above threshold, at most topk of each level."""
    classes = scores.shape[1]
    flat = scores.reshape(-1)
    kept, start = [], 0
    for length in levels:
        level = flat[start * classes : (start + length) * classes]
        index = (level > threshold).nonzero()[:, 0]
        if len(index) > topk:
            index = index[level[index].topk(topk).indices]
        kept.append(index + start * classes)
        start += length
    index = torch.cat(kept)
    return torch.div(index, classes, rounding_mode='floor'), index % classes, flat[index]


def top_candidates(scores: Tensor, levels: Sequence[int], topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates of every picture, as many for each: what decoding keeps of it in an exported graph.

    Args:
        scores: (B, N, K).
        levels: anchors of each level.
        topk: candidates of each level.

    Returns:
        anchor (B, M), score (B, M), label (B, M); per level best first.
    """
    classes, kept, values, start = scores.shape[2], [], [], 0
    for length in levels:
        level = scores[:, start : start + length].flatten(1)
        value, index = level.topk(min(topk, length * classes), dim=1)
        values.append(value)
        kept.append(index + start * classes)
        start += length
    index = torch.cat(kept, 1)
    return torch.div(index, classes, rounding_mode='floor'), torch.cat(values, 1), index % classes


def best_equal(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    suppress: Suppress,
    nms: float,
    limit: int,
    score_threshold: float,
    min_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`finish` with equally many results for each picture, for exported graphs.

    Candidates (B, M, 4), (B, M), (B, M) -> boxes (B, D, 4), scores (B, D), labels (B, D), best first, D at most
    `limit`; rows that hold nothing have the score 0.
    """
    if min_size >= 0:
        large = ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(-1)
        scores = torch.where(large, scores, -1.0)
    keep = suppress(apart(boxes, labels), scores, nms)
    best, index = torch.where(keep, scores, -1.0).topk(min(limit, scores.shape[1]), 1)
    best = torch.where(best > score_threshold, best, 0.0)
    return pick(boxes, index), best, labels.gather(1, index)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """(B, N, C), (B, M) -> (B, M, C): those rows of each picture."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def finish(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    size: Size,
    original: Size | None,
    *,
    nms: float,
    limit: int,
    min_size: float,
) -> dict[str, Tensor]:
    """Clip to the valid size, drop boxes with a side <= min_size, NMS by class, best `limit`, scale to `original`."""
    boxes = clip_boxes_to_image(boxes, size)
    if min_size >= 0:
        large = ((boxes[:, 2:] - boxes[:, :2]) > min_size).all(1)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
    keep = batched_nms(boxes, scores, labels, nms)[:limit]
    return {'boxes': rescale(boxes[keep], size, original), 'scores': scores[keep], 'labels': labels[keep]}


def rescale(boxes: Tensor, size: Size, original: Size | None) -> Tensor:
    """Boxes from a picture of `size` (h, w) to the same picture of `original` (H, W)."""
    if original is None or tuple(original) == tuple(size):
        return boxes
    x, y = original[1] / size[1], original[0] / size[0]
    return boxes * boxes.new_tensor([x, y, x, y])


def centres_inside(anchors: Tensor, size: Size) -> Tensor:
    """(N,) bool: anchors whose centre lies on the valid part of the picture."""
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    return (x < size[1]) & (y < size[0])


def pair(size: Sequence[int]) -> Size:
    """(h, w) as two ints, whatever holds them."""
    return int(size[0]), int(size[1])


def check_thresholds(**values: float) -> None:
    """ValueError unless every value is in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be in [0, 1], got {value}')
