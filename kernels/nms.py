"""Greedy non-maximum suppression as a mask of fixed shape:
keep[b, i] = no j of the same picture with keep[b, j], (s[j], -j) > (s[i], -i), IoU(box[b, i], box[b, j]) > threshold.

Two forms of one thing. `suppress_by_products` is plain tensor operations and so goes into any graph, TensorRT's too,
whose compilers for RTX have no NonMaxSuppression: the mask starts full and is recomputed from itself, one product of
the (M, M) matrix of conflicts with it per round. After n rounds it is exact wherever chains of suppression (a would
suppress b, which would suppress c, ...) are at most n long; an even number of rounds never loses a box. `suppress`
repeats until nothing changes, which is exact; it is an operator of its own, which becomes ONNX's NonMaxSuppression.
Source of the recomputation: Cluster-NMS (Zheng et al., arXiv 2005.03572).

B pictures, M boxes of a picture.
"""

import torch
from torch import Tensor

ROUNDS = 8


def suppress_by_products(boxes: Tensor, scores: Tensor, threshold: float, *, rounds: int = ROUNDS) -> Tensor:
    """Which boxes greedy suppression keeps, by `rounds` matrix products.

    Args:
        boxes: (B, M, 4) xyxy float.
        scores: (B, M).
        threshold: IoU above which the box of the lower score goes.
        rounds: an even number.

    Returns:
        (B, M) bool.

    Raises:
        ValueError: shapes do not fit, or rounds is not even and positive.
    """
    _check(boxes, scores)
    if rounds < 2 or rounds % 2:
        raise ValueError(f'rounds must be an even number from 2 on, got {rounds=}')
    conflict = _conflicts(boxes, scores, threshold)
    keep = torch.ones_like(scores, dtype=conflict.dtype)[..., None]
    for _ in range(rounds):
        keep = ((conflict @ keep) < 0.5).to(conflict.dtype)
    return keep[..., 0] > 0.5


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Exactly which boxes greedy suppression keeps; in an exported ONNX file one NonMaxSuppression.

    Args and errors: see `suppress_by_products`.
    """
    _check(boxes, scores)
    return _suppress(boxes, scores, float(threshold))


def apart(boxes: Tensor, groups: Tensor) -> Tensor:
    """Boxes (B, M, 4) of different groups (B, M) moved so far from each other that none of them overlap."""
    return boxes + (groups.to(boxes.dtype) * (boxes.amax((1, 2))[:, None] + 1))[..., None]


@torch.library.custom_op('densezoo::suppress', mutates_args=())
def _suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    conflict = _conflicts(boxes, scores, threshold)
    keep = torch.ones_like(scores, dtype=conflict.dtype)[..., None]
    while True:
        before, keep = keep, ((conflict @ keep) < 0.5).to(conflict.dtype)
        if torch.equal(before, keep):
            return keep[..., 0] > 0.5


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _conflicts(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """(B, M, M) of 0 and 1: box j, if kept, suppresses box i."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    overlap = width * height
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    area = width * height
    close = overlap > threshold * (area[:, :, None] + area[:, None, :] - overlap)
    position = torch.arange(scores.shape[1], device=scores.device)
    higher, equal = scores[:, None, :] > scores[:, :, None], scores[:, None, :] == scores[:, :, None]
    return (close & (higher | (equal & (position[None, :] < position[:, None])))).to(boxes.dtype)


def _check(boxes: Tensor, scores: Tensor) -> None:
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or scores.shape != boxes.shape[:2]:
        raise ValueError(
            f'boxes must be (B, M, 4) and scores (B, M), got {tuple(boxes.shape)=} and {tuple(scores.shape)=}'
        )
