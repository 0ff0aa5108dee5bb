"""Losses for several heads: Dice (Milletari et al. 2016), Lovasz-Softmax (Berman et al. 2018), Charbonnier, Pearson's
correlation (Histoformer, Sun et al. 2024)."""

import torch
from torch import Tensor


def soft_dice(logits: Tensor, labels: Tensor, known: Tensor, eps: float = 1.0) -> Tensor:
    """1 - mean over the classes present in the batch of 2 |P Y| / (|P| + |Y|), P softmax, Y one-hot, known pixels only.

    Args:
        logits: (B, K, H, W) float.
        labels: (B, H, W) int64; anything where `known` is False.
        known: (B, H, W) bool.
        eps: added to numerator and denominator, in pixels.
    """
    classes = logits.shape[1]
    probabilities = logits.softmax(1).permute(0, 2, 3, 1)[known]  # (N, K)
    labels = labels[known]
    size = labels.bincount(minlength=classes).to(probabilities)
    true = probabilities.gather(1, labels[:, None])[:, 0]
    overlap = torch.zeros_like(size).scatter_add(0, labels, true)
    dice = (2 * overlap + eps) / (probabilities.sum(0) + size + eps)
    present = size > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def lovasz_softmax(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The convex surrogate of 1 - mean IoU over the classes present (arguments: soft_dice); sorts all pixels."""
    probabilities = logits.softmax(1).permute(0, 2, 3, 1)[known]  # (N, K)
    labels = labels[known]
    present = labels.bincount(minlength=logits.shape[1]).nonzero()[:, 0]
    if not len(present):
        return logits.sum() * 0
    truth = (labels[None] == present[:, None]).to(probabilities)  # (classes present, N)
    errors = (truth - probabilities.t()[present]).abs()
    errors, order = errors.sort(1, descending=True)
    truth = truth.gather(1, order)
    size = truth.sum(1, keepdim=True)
    # Jaccard loss when the n worst pixels are all wrong; its increments weigh the sorted errors.
    jaccard = 1 - (size - truth.cumsum(1)) / (size + (1 - truth).cumsum(1))
    weights = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], 1)
    return (errors * weights).sum(1).mean()


def charbonnier(difference: Tensor, eps: float = 1e-3) -> Tensor:
    """sqrt(d^2 + eps^2) elementwise: L1 with a smooth foot."""
    return torch.sqrt(difference * difference + eps * eps)


def pearson(restored: Tensor, clean: Tensor, inside: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Mean over the pictures of (1 - r) / 2, r the correlation of all values of a picture with those of the clean one.

    A constant picture has r = 0; pictures whose r is not finite are left out.

    Args:
        restored, clean: (B, C, H, W) float.
        inside: (B, 1, H, W) 0/1, what belongs to each picture; None for everything.
        eps: added to the denominator.
    """
    pair = []
    for x in (restored, clean):
        if inside is None:
            centred = x - x.mean((1, 2, 3), keepdim=True)
        else:
            count = inside.sum((1, 2, 3), keepdim=True).clamp(min=1) * x.shape[1]
            centred = (x - (x * inside).sum((1, 2, 3), keepdim=True) / count) * inside
        pair.append(centred.flatten(1))
    norms = [torch.linalg.vector_norm(x, dim=1) for x in pair]
    correlation = (pair[0] * pair[1]).sum(1) / (norms[0] * norms[1] + eps)
    finite = correlation.isfinite()
    return torch.where(finite, (1 - correlation) / 2, 0).sum() / finite.sum().clamp(min=1)
