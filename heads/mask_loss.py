"""Matching and losses of Mask2Former (Cheng et al. 2022, arXiv:2112.01527): one-to-one assignment, cross-entropy and
Dice at sampled points (PointRend, Kirillov et al. 2020, arXiv:1912.08193), for a whole batch and all layers.

Costs of all layers are matched in one call, with one copy to the host; masks are never compared at full resolution.
Written from the papers and from facts of facebookresearch/Mask2Former (MIT).
"""

from typing import NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from .hungarian import NONE, hungarian
from .universal import Segments

# L layers, B pictures, Q queries, M segments of the fullest picture, K classes, T segments in the batch, P points


class Weights(NamedTuple):
    """Factors of the three terms, of a match's cost or the loss; no_object, of the loss, is for unmatched queries."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1


class Points(NamedTuple):
    """How masks are sampled: points per mask; of oversample times as many random ones the most uncertain are taken,
    as a share `important` of the points, the others are random."""

    number: int = 12544
    oversample: float = 3.0
    important: float = 0.75


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, P, 2), x and y in 0..1 -> (N, C, P); zeros outside."""
    return F.grid_sample(maps, (2 * points - 1)[:, :, None], align_corners=False)[..., 0]


def matching_costs(
    classes: Tensor, masks: Tensor, segments: Segments, points: Tensor, weights: Weights | None = None
) -> Tensor:
    """Cost of each query for each segment.

    Args:
        classes: (L, B, Q, K + 1) logits.
        masks: (L, B, Q, h, w) logits.
        points: (B, P, 2), at which all masks of a picture are compared.

    Returns:
        (L, B, Q, M); columns from a picture's count on mean nothing.
    """
    weights = weights or Weights()
    truth = sample(segments.masks.to(masks.dtype), points).transpose(1, 2)  # (B, P, M)
    count = points.shape[1]
    costs = []
    for logits, shape in zip(classes, masks):
        probability = logits.softmax(-1)
        of_class = probability.gather(2, segments.labels[:, None].expand(-1, probability.shape[1], -1))
        x = sample(shape, points)  # (B, Q, P)
        # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
        entropy = (F.softplus(x).sum(2, keepdim=True) - x @ truth) / count
        share = x.sigmoid()
        dice = 1 - (2 * (share @ truth) + 1) / (share.sum(2, keepdim=True) + truth.sum(1, keepdim=True) + 1)
        costs.append(weights.mask * entropy - weights.classes * of_class + weights.dice * dice)
    return torch.stack(costs)


@torch.no_grad()
def match(classes: Tensor, masks: Tensor, segments: Segments, points: Tensor, weights: Weights | None = None) -> Tensor:
    """(L, B, Q) int64: the segment of each query, -1 for none."""
    if not segments.labels.shape[1]:
        return torch.full(classes.shape[:3], NONE, device=classes.device)
    return hungarian(matching_costs(classes, masks, segments, points, weights), segments.counts)


def class_losses(classes: Tensor, matched: Tensor, segments: Segments, no_object: float = 0.1) -> Tensor:
    """Weighted mean of the cross-entropy over all queries: (L, B, Q, K + 1) logits -> (L,)."""
    last = classes.shape[-1] - 1
    labels = F.pad(segments.labels, (0, 1)).expand(len(classes), -1, -1).gather(2, matched.clamp(min=0))
    labels = torch.where(matched == NONE, last, labels)
    weight = torch.where(labels == last, no_object, 1.0).to(classes)
    loss = F.cross_entropy(classes.flatten(0, 2), labels.flatten(), reduction='none').view_as(weight)
    return (loss * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


def mask_losses(
    masks: Tensor, matched: Tensor, segments: Segments, total: Tensor, how: Points, points: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice of matched masks, summed and divided by `total`: (L,) each.

    Args:
        masks: (L, B, Q, h, w) logits.
        matched: (L, B, Q), see `match`.
        total: number of segments.
        points: (T, P, 2) to take in place of sampled ones.
    """
    picture, column = _real(segments)
    entropies, dices = [], []
    truth = segments.masks[picture, column, None].to(masks.dtype)  # (T, 1, H, W)
    for layer, shape in zip(matched, masks):
        # The query of each segment; with more segments than queries some have none.
        queries = (layer[:, None] == torch.arange(segments.labels.shape[1], device=layer.device)[:, None])[
            picture, column
        ]
        found = queries.any(1)
        query = queries.int().argmax(1)
        logits = shape[picture, query, None]  # (T, 1, h, w)
        with torch.no_grad():
            at = uncertain_points(logits, how) if points is None else points
            labels = sample(truth, at)[:, 0]
        x = sample(logits, at)[:, 0]  # (T, P)
        entropy = F.binary_cross_entropy_with_logits(x, labels, reduction='none').mean(1)
        share = x.sigmoid()
        dice = 1 - (2 * (share * labels).sum(1) + 1) / (share.sum(1) + labels.sum(1) + 1)
        entropies.append((entropy * found).sum() / total)
        dices.append((dice * found).sum() / total)
    return torch.stack(entropies), torch.stack(dices)


def _real(segments: Segments) -> tuple[Tensor, Tensor]:
    """Picture and column of each of the T segments that are no padding."""
    counts = torch.tensor(segments.counts, device=segments.labels.device)
    real = torch.arange(segments.labels.shape[1], device=counts.device) < counts[:, None]
    picture, column = real.nonzero(as_tuple=True)
    return picture, column


def uncertain_points(logits: Tensor, how: Points) -> Tensor:
    """Points (T, P, 2) where logits (T, 1, h, w) are near zero, and random ones."""
    number = len(logits)
    drawn = torch.rand(number, int(how.number * how.oversample), 2, device=logits.device, dtype=logits.dtype)
    important = int(how.number * how.important)
    index = sample(logits, drawn)[:, 0].abs().topk(important, dim=1, largest=False, sorted=False).indices
    chosen = drawn.gather(1, index[..., None].expand(-1, -1, 2))
    others = torch.rand(number, how.number - important, 2, device=logits.device, dtype=logits.dtype)
    return torch.cat([chosen, others], 1)


def average_total(count: int, device: torch.device) -> Tensor:
    """Segments of a rank on average, at least 1: what sums over a batch are divided by."""
    total = torch.tensor(float(count), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)
