"""What heads share that answer with masks and classes of queries: one prediction is read as a semantic map, as
instances and as a panoptic map (MaskFormer, Cheng et al. 2021, arXiv:2107.06278; kMaX-DeepLab, arXiv:2207.04044).

Targets and results: see `segments`. A result holds `mask` (semantic), `boxes`, `labels`, `scores`, `masks` (instances)
and `panoptic`, `segment_labels`, `segment_scores`, so each task's own evaluator reads it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes

from .detection import check_thresholds
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, positive
from .segments import IGNORE, KINDS, segments

# B batch, Q queries, M segments of the fullest picture, S segments, K classes, H W pixels


class Segments(NamedTuple):
    """Segments of a batch, padded to the fullest picture: labels (B, M) int64, masks (B, M, H, W) bool, and how many
    of each picture are real."""

    labels: Tensor
    masks: Tensor
    counts: list[int]


class Reader(NamedTuple):
    """How logits become results: plain numbers, which an exported file carries in its metadata.

    rule: 'argmax', masks are sigmoids and each pixel goes to the best query (MaskFormer); or 'order', masks are a
        softmax over the queries, which take pixels one after the other (kMaX-DeepLab).
    stride: of the mask logits, in input pixels.
    things, tasks: see UniversalHead.
    mask_threshold: probability from which on a pixel belongs to an instance.
    score_threshold, stuff_threshold: class probability that the panoptic map asks for; that of stuff in 'order' alone.
    overlap_threshold, detections: see UniversalHead.
    align_corners: of the enlargement; None: of batches of odd width, as kMaX-DeepLab's of 32 k + 1 pixels.
    """

    rule: str
    stride: int
    things: tuple[int, ...]
    tasks: tuple[str, ...]
    mask_threshold: float
    score_threshold: float
    stuff_threshold: float
    overlap_threshold: float
    detections: int
    align_corners: bool | None = False

    def results(
        self,
        classes: Tensor,
        masks: Tensor,
        sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
    ) -> list[dict[str, Tensor]]:
        """One result per picture.

        Args:
            classes: (B, Q, K + 1) logits, no object last; (B, T, Q, K + 1) where each task has its own.
            masks: (B, Q, h, w) or (B, T, Q, h, w) logits.
            sizes, original_sizes: (height, width) of each picture inside the batch, and of the results.
        """
        results: list[dict[str, Tensor]] = []
        for i, (height, width) in enumerate(sizes):
            result: dict[str, Tensor] = {}
            for tasks, kinds, shapes in self._runs(classes[i], masks[i]):
                logits = self.enlarge(shapes[None], sizes)[..., :height, :width]
                if original_sizes is not None and tuple(original_sizes[i]) != (height, width):
                    size = tuple(original_sizes[i])
                    logits = F.interpolate(logits, size=size, mode='bilinear', align_corners=False)
                probability = logits[0].sigmoid() if self.rule == 'argmax' else logits[0].softmax(0)
                for task in tasks:
                    result |= self._read(task, at_least_float32(kinds).softmax(-1), probability)
            results.append(result)
        return results

    def _runs(self, classes: Tensor, masks: Tensor) -> list[tuple[Sequence[str], Tensor, Tensor]]:
        if classes.ndim == 2:
            return [(self.tasks, classes, masks)]
        return [([task], *answer) for task, answer in zip(self.tasks, zip(classes, masks), strict=True)]

    def enlarge(self, masks: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Mask logits (B, Q, h, w) at the size of the batch."""
        size = [side * self.stride for side in masks.shape[-2:]]
        aligned = bool(self.align_corners)
        if self.align_corners is not False:
            # The batch may be smaller than its maps' cells: 97 pixels have as many as 100.
            largest = [max(sides) for sides in zip(*sizes)]
            size = [seen if side - self.stride < seen <= side else side for seen, side in zip(largest, size)]
            aligned = self.align_corners or size[1] % 2 == 1
        return F.interpolate(at_least_float32(masks), size=size, mode='bilinear', align_corners=aligned)

    def _read(self, task: str, classes: Tensor, masks: Tensor) -> dict[str, Tensor]:
        if task == 'semantic':
            return {'mask': semantic_map(classes, masks).argmax(0)}
        if task == 'instance':
            return instances(classes, masks, things=self.things, threshold=self.mask_threshold, limit=self.detections)
        if self.rule == 'argmax':
            found = panoptic_by_argmax(
                classes,
                masks,
                things=self.things,
                score_threshold=self.score_threshold,
                overlap_threshold=self.overlap_threshold,
            )
        else:
            found = panoptic_in_order(
                classes,
                masks,
                things=self.things,
                thing_threshold=self.score_threshold,
                stuff_threshold=self.stuff_threshold,
                overlap_threshold=self.overlap_threshold,
                mask_threshold=self.mask_threshold,
            )
        return dict(zip(('panoptic', 'segment_labels', 'segment_scores'), found, strict=True))


class UniversalHead(nn.Module):
    """Base of the heads. `forward` of a subclass gives logits of classes (B, Q, K + 1), no object last, and of masks
    (B, Q, h, w), or (B, T, ...) where each task is answered by itself.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K, things and stuff together.
        things: ids of the classes that are objects, or how many of the first classes are.
        tasks: what `predict` answers: 'semantic', 'instance', 'panoptic'.
        rule, mask_threshold, stuff_threshold, align_corners: of decoding, see Reader.
        score_threshold: a query takes part in the panoptic map if its class probability exceeds this.
        overlap_threshold: share of its own pixels that a segment must keep in the panoptic map.
        detections: instances per picture.
        sub_pixel: masks are so many times finer than the first map.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        things: int | Sequence[int],
        tasks: Sequence[str],
        rule: str,
        mask_threshold: float,
        score_threshold: float,
        stuff_threshold: float,
        overlap_threshold: float,
        detections: int,
        align_corners: bool | None = False,
        sub_pixel: int = 1,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        things_ = tuple(range(things)) if isinstance(things, int) else tuple(sorted(set(things)))
        if things_ and not 0 <= things_[0] <= things_[-1] < num_classes:
            raise ValueError(f'things must be class ids 0..{num_classes - 1}, or how many of them, got {things}')
        if not tasks or any(task not in KINDS for task in tasks):
            raise ValueError(f'tasks must be some of {KINDS}, got {tuple(tasks)}')
        check_thresholds(
            mask_threshold=mask_threshold,
            score_threshold=score_threshold,
            stuff_threshold=stuff_threshold,
            overlap_threshold=overlap_threshold,
        )
        self.reader = Reader(
            rule,
            self._mask_stride(sub_pixel),
            things_,
            tuple(tasks),
            mask_threshold,
            score_threshold,
            stuff_threshold,
            overlap_threshold,
            positive('detections', detections),
            align_corners,
        )

    def _mask_stride(self, sub_pixel: int) -> int:
        stride = self.inputs.reduction()[0]
        if sub_pixel < 1 or stride % sub_pixel:
            raise ValueError(f'sub_pixel must be a divisor of the first stride {stride}, got {sub_pixel}')
        return stride // sub_pixel

    def gather(self, targets: Sequence[Mapping[str, Any]], padded: Size, kinds: Sequence[str]) -> Segments:
        """The segments of a batch, each picture's of its kind, on a canvas of the padded size.

        Raises:
            ValueError: a class id that is none, or a picture larger than the batch.
        """
        found = [
            segments(target, things=self.reader.things, kind=kind) for target, kind in zip(targets, kinds, strict=True)
        ]
        counts = [len(labels) for labels, _ in found]
        device = found[0][0].device
        labels = torch.zeros((len(found), max(counts)), dtype=torch.int64, device=device)
        masks = torch.zeros((*labels.shape, *padded), dtype=torch.bool, device=device)
        for i, (label, mask) in enumerate(found):
            height, width = mask.shape[-2:]
            if height > padded[0] or width > padded[1]:
                raise ValueError(f'masks must not be larger than the padded batch {padded}, got {(height, width)}')
            labels[i, : counts[i]] = label
            masks[i, : counts[i], :height, :width] = mask
        if labels.numel() and not 0 <= labels.min() <= labels.max() < self.num_classes:
            wrong = labels[(labels < 0) | (labels >= self.num_classes)][0]
            raise ValueError(
                f'class ids must be 0..{self.num_classes - 1}, or {IGNORE} in mask, got {int(wrong)}; is num_classes='
                f'{self.num_classes} right?'
            )
        return Segments(labels, masks, counts)

    def predict(
        self, features: Sequence[Tensor], sizes: Sequence[Size], original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """One result per picture, of `original_sizes` where given, else of `sizes`; `tasks` says what is in it."""
        check_sizes(sizes, len(features[0]), self.inputs.padded_size(features), original_sizes)
        classes, masks = self(features)
        return self.reader.results(classes, masks, sizes, original_sizes)


def at_least_float32(x: Tensor) -> Tensor:
    """float32 where it is less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def semantic_map(classes: Tensor, masks: Tensor) -> Tensor:
    """Sum over queries of class x mask: (Q, K + 1), (Q, H, W) probabilities -> (K, H, W)."""
    return (classes[:, :-1].T @ masks.flatten(1)).unflatten(1, masks.shape[1:])


def instances(
    classes: Tensor, masks: Tensor, *, things: Sequence[int], threshold: float, limit: int
) -> dict[str, Tensor]:
    """The best (query, class) pairs of all classes, of which the things are kept, as torchvision's results.

    Scores are class probability x mean mask probability inside the mask; masks without a pixel are dropped.

    Args:
        classes: (Q, K + 1) probabilities.
        masks: (Q, H, W) probabilities.
        threshold: of the masks.
        limit: pairs.
    """
    scores = classes[:, :-1]
    kinds = scores.shape[1]
    best, index = scores.flatten().topk(min(limit, scores.numel()))
    inside = masks > threshold
    area = inside.flatten(1).sum(1)
    mean = (masks * inside).flatten(1).sum(1) / (area + 1e-6)
    query, label = index // kinds, index % kinds
    keep = torch.isin(label, torch.tensor(things, dtype=label.dtype, device=label.device)) & (area[query] > 0)
    query, label, score = query[keep], label[keep], best[keep] * mean[query[keep]]
    order = score.argsort(descending=True, stable=True)
    query, found = query[order], inside[query[order]]
    boxes = masks_to_boxes(found) if len(found) else masks.new_zeros(0, 4)
    # From pixel indices to borders: the last pixel lies inside.
    boxes = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    return {'boxes': boxes, 'labels': label[order], 'scores': score[order], 'masks': found}


def panoptic_by_argmax(
    classes: Tensor, masks: Tensor, *, things: Sequence[int], score_threshold: float, overlap_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """MaskFormer's rule: each pixel goes to the query of the largest score x mask probability. A query whose share of
    its own mask (probability of at least 1/2) falls below the overlap is dropped; stuff of one class is one segment.

    Args:
        classes: (Q, K + 1) probabilities; queries that prefer no object, or are below the score, take no part.
        masks: (Q, H, W) probabilities.

    Returns:
        map (H, W) int64 of segments 1..S, 0 where there is none; labels (S,) int64; scores (S,).
    """
    scores, labels = classes.max(-1)
    keep = (labels < classes.shape[1] - 1) & (scores > score_threshold)
    scores, labels, masks = scores[keep], labels[keep], masks[keep]
    empty = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    if not len(scores):
        return empty, labels, scores
    owner = (scores[:, None, None] * masks).argmax(0)
    sure = masks.gather(0, owner[None])[0] >= 0.5
    won = owner.flatten().bincount(minlength=len(scores))
    own = (masks >= 0.5).flatten(1).sum(1)
    seen = owner[sure].bincount(minlength=len(scores))
    accepted = (seen > 0) & (won >= overlap_threshold * own)
    number, chosen = _numbers(labels, accepted, things)
    return torch.where(sure, number[owner], 0), labels[chosen], scores[chosen]


def panoptic_in_order(
    classes: Tensor,
    masks: Tensor,
    *,
    things: Sequence[int],
    thing_threshold: float,
    stuff_threshold: float,
    overlap_threshold: float,
    mask_threshold: float = 0.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """kMaX-DeepLab's rule: queries in the order of class score x mean mask probability take the pixels that are still
    free; one that would get too small a share of its mask is dropped; stuff of one class is one segment.

    Arguments and result: as `panoptic_by_argmax`.
    """
    scores, labels = classes[:, :-1].max(-1)
    inside = masks > mask_threshold
    area = inside.flatten(1).sum(1)
    quality = scores * (masks * inside).flatten(1).sum(1) / area.clamp(min=1)
    thing = torch.isin(labels, torch.tensor(things, dtype=labels.dtype, device=labels.device))
    sure = scores > torch.where(thing, thing_threshold, stuff_threshold)
    order = quality.argsort(descending=True, stable=True)
    order = order[sure[order]]
    taken = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    accepted = torch.zeros(len(order), dtype=torch.bool, device=masks.device)
    # One after the other: what a query gets depends on those before it.
    for place, query in enumerate(order.tolist()):
        free = inside[query] & (taken == 0)
        if free.sum() > area[query] * overlap_threshold:
            taken[free] = place + 1
            accepted[place] = True
    labels, quality = labels[order], quality[order]
    number, chosen = _numbers(labels, accepted, things)
    return F.pad(number, (1, 0))[taken], labels[chosen], quality[chosen]


def _numbers(labels: Tensor, accepted: Tensor, things: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The segment's number of each query, 0 for none, and the query that each segment takes its class from."""
    number, chosen = [0] * len(labels), []
    stuff: dict[int, int] = {}
    for query, (label, yes) in enumerate(zip(labels.tolist(), accepted.tolist())):
        if not yes:
            continue
        if label in stuff:
            number[query] = stuff[label]
            continue
        chosen.append(query)
        number[query] = len(chosen)
        if label not in things:
            stuff[label] = len(chosen)
    device = labels.device
    return torch.tensor(number, device=device, dtype=torch.int64), torch.tensor(
        chosen, device=device, dtype=torch.int64
    )
