"""Matching and losses of kMaX-DeepLab (Yu et al. 2022, arXiv:2207.04044; MaX-DeepLab, arXiv:2012.00759), for a whole
batch at once.

Masks are a softmax over the queries. A query and a segment are alike by (Dice of masks) x (probability of the class),
and each factor weighs the other's loss, so that what PQ multiplies is optimised together. Pixels without a segment are
void: they are left out of every mask term.

Written from the papers and from facts of bytedance/kmax-deeplab (Apache 2.0).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .hungarian import NONE, hungarian
from .kmax_decoder import Prediction
from .universal import Segments

# B batch, Q queries, M segments of the fullest picture, K classes, P pixels of the finest map, D width of a pixel

TEMPERATURE = 0.3  # of the similarity of pixels


class Truth(NamedTuple):
    """The segments in the order of the queries."""

    masks: Tensor  # (B, Q, P), at most 1 in each pixel
    classes: Tensor  # (B, Q), K for no object
    class_weight: Tensor  # (B, Q): Dice of matched queries, share in void of the others
    mask_weight: Tensor  # (B, Q): class probability of matched queries, 0 for the others
    void: Tensor  # (B, P)
    rarity: Tensor  # (B, P): pixels of the picture over pixels of the segment


def similarities(prediction: Prediction, segments: Segments) -> tuple[Tensor, Tensor]:
    """Of masks (Dice, without void pixels) and of classes, (B, Q, M) each."""
    share = prediction.masks.flatten(2).softmax(1)
    masks = segments.masks.flatten(2).to(share)
    share = share * (masks.amax(1, keepdim=True) > 0) if masks.shape[1] else share * 0
    overlap = share @ masks.transpose(1, 2)
    dice = overlap / ((share.sum(2)[:, :, None] + masks.sum(2)[:, None]) / 2 + 1e-5)
    probability = prediction.classes.softmax(-1)
    return dice, probability.gather(2, segments.labels[:, None].expand(-1, probability.shape[1], -1))


@torch.no_grad()
def match(prediction: Prediction, segments: Segments, floor: float = 1e-5) -> Truth:
    """Each query's segment and weights; with more segments than queries the rest become void."""
    dice, probability = similarities(prediction, segments)
    matched = hungarian(-dice * probability, segments.counts)  # (B, Q)
    found = matched != NONE
    of = matched.clamp(min=0)
    masks = segments.masks.flatten(2).to(dice)
    if not masks.shape[1]:
        masks = masks.new_zeros(len(masks), 1, masks.shape[2])
        dice, probability = dice.new_zeros(*dice.shape[:2], 1), dice.new_zeros(*dice.shape[:2], 1)
    ordered = masks.gather(1, of[..., None].expand(-1, -1, masks.shape[2])) * found[..., None]
    layers = ordered.sum(1, keepdim=True)
    void = layers[:, 0] == 0
    ordered = ordered / layers.clamp(min=1)  # instances may overlap; a pixel's shares sum to one
    area = (ordered * ordered.sum(2, keepdim=True)).sum(1)
    labels = F.pad(segments.labels, (0, 1)).gather(1, of)
    share = prediction.masks.flatten(2).softmax(1)
    in_void = (share @ void[..., None].to(share))[..., 0] / (share.sum(2) + 1e-5)
    return Truth(
        masks=ordered,
        classes=torch.where(found, labels, prediction.classes.shape[-1] - 1),
        class_weight=torch.where(found, dice.gather(2, of[..., None])[..., 0], in_void).clamp(min=floor),
        mask_weight=torch.where(found, probability.gather(2, of[..., None])[..., 0].clamp(min=floor), 0.0),
        void=void,
        rarity=ordered.shape[2] / area.clamp(min=1),
    )


def class_loss(logits: Tensor, truth: Truth, alpha: float = 0.75) -> Tensor:
    """Weighted cross-entropy: `alpha` for objects, 1 - alpha for void."""
    loss = F.cross_entropy(logits.transpose(1, 2), truth.classes, reduction='none')
    balance = torch.where(truth.classes == logits.shape[-1] - 1, 1 - alpha, alpha)
    return mean_of_nonzero(loss * balance * truth.class_weight)


def mask_losses(logits: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each pixel's query, and Dice of each matched query; logits (B, Q, H, W)."""
    log_share = logits.flatten(2).log_softmax(1)
    cross_entropy = -(truth.masks * log_share).sum(1)
    share = log_share.exp().masked_fill(truth.void[:, None], 0)
    dice = 1 - (2 * (share * truth.masks).sum(2) + 1) / (share.sum(2) + truth.masks.sum(2) + 1)
    return mean_of_nonzero(cross_entropy.masked_fill(truth.void, 0)), 0.75 * (dice * truth.mask_weight).mean()


def pixel_loss(pixels: Tensor, truth: Truth, samples: int, temperature: float = 1.5) -> Tensor:
    """Contrast between sampled pixels (B, D, H, W), those of one segment being positives (instance discrimination).

    Rare segments' pixels are drawn more often, by rarity ** temperature; void ones only when the others run out.
    """
    index = draw(truth, samples, temperature)
    chosen = truth.masks.gather(2, index[:, None].expand(-1, truth.masks.shape[1], -1))
    alike = chosen.transpose(1, 2) @ chosen
    alike = alike / alike.sum(1, keepdim=True).clamp(min=1)
    pixels = pixels.flatten(2)
    pixels = pixels.gather(2, index[:, None].expand(-1, pixels.shape[1], -1))
    return mean_of_nonzero(-(alike * (pixels.transpose(1, 2) @ pixels / TEMPERATURE).log_softmax(1)).sum(1))


def semantic_loss(
    logits: Tensor, labels: Tensor, truth: Truth, *, num_classes: int, samples: int, temperature: float = 2.0
) -> Tensor:
    """Cross-entropy of sampled pixels of the auxiliary branch.

    Args:
        logits: (B, K or K + 1, h, w).
        labels: (B, h, w) class ids, outside 0..K-1 where nothing is known.
        samples: pixels per picture, drawn as those of `pixel_loss` (on the finest map alone); 0 for all.
    """
    logits, labels = logits.flatten(2), labels.flatten(1)
    known = (labels >= 0) & (labels < num_classes)
    if samples:
        index = draw(truth, samples, temperature)
        labels, known = labels.gather(1, index), known.gather(1, index)
        logits = logits.gather(2, index[:, None].expand(-1, logits.shape[1], -1))
    loss = F.cross_entropy(logits, labels.where(known, 0), reduction='none')
    return mean_of_nonzero(loss * known)


def draw(truth: Truth, samples: int, temperature: float) -> Tensor:
    """(B, k) indices of pixels without replacement, by the Gumbel trick."""
    logits = truth.rarity.log() * temperature - 99999.0 * truth.void
    noise = -(-torch.rand_like(logits).clamp(1e-20, 1 - 1e-7).log()).log()
    return (logits + noise).topk(min(samples, logits.shape[1]), dim=1).indices


def mean_of_nonzero(loss: Tensor) -> Tensor:
    """Mean over each picture's terms that are not zero, then over pictures: (B, N) -> scalar."""
    return (loss.sum(1) / (loss != 0).sum(1).clamp(min=1)).mean()
