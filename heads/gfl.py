"""GFL: Generalized Focal Loss (Li et al. 2020, arXiv:2006.04388): class scores that rank by IoU, and box sides as
distributions.

Loss: quality focal loss, GIoU and distribution focal loss, both weighted by the class score. Anchors and matching are
ATSS's. Written from the paper; numbers are those of MMDetection's GFLHead (Apache-2.0), whose names `atss.convert`
takes. Labels are 0..K-1.
Differs: boxes that clipping leaves empty are dropped (min_size=-1 keeps them).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import detection as det
from .atss import SquareAnchors
from .one_stage import IOU_LOSSES, Candidates
from .pyramid import FeatureInfo, choose, positive

# B pictures, K classes, N anchors of all levels, R + 1 distances in strides, of which each side has a distribution


class GFL(SquareAnchors):
    """One-stage detector with generalized focal losses on maps of one width (an FPN's).

    Args:
        feature_info ... num_candidates, prior, score_threshold ... min_size: see SquareAnchors.
        max_distance: R, the largest distance from an anchor's centre to a side, in strides.
        box_loss: 'giou' (published), 'iou', 'diou' or 'ciou'.
        box_weight, distribution_weight: factors of the two box losses.
        quality_gamma: exponent of the quality focal loss.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int | None = None,
        num_convs: int = 4,
        norm: str = 'group',
        anchor_scale: float = 8.0,
        anchor_offset: float = 0.0,
        num_candidates: int = 9,
        max_distance: int = 16,
        box_loss: str = 'giou',
        box_weight: float = 2.0,
        distribution_weight: float = 0.25,
        quality_gamma: float = 2.0,
        prior: float = 0.01,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        topk: int = 1000,
        detections: int = 100,
        min_size: float = 0.0,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            outputs=4 * (positive('max_distance', max_distance) + 1),
            channels=channels,
            num_convs=num_convs,
            norm=norm,
            anchor_scale=anchor_scale,
            anchor_offset=anchor_offset,
            num_candidates=num_candidates,
            prior=prior,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            topk=topk,
            detections=detections,
            min_size=min_size,
        )
        self.max_distance, self.anchor_scale = max_distance, anchor_scale
        self.box_loss, self.box_weight = choose('box_loss', box_loss, tuple(IOU_LOSSES)), box_weight
        self.distribution_weight, self.quality_gamma = distribution_weight, quality_gamma

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> class logits (B, N, K), logits of the sides' distributions (B, N, 4 (R + 1))."""
        return self.towers(features)[:2]

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_cls', 'loss_box', 'loss_distribution'}."""
        logits, sides = (x.float() for x in self(features))
        truth = det.gather_targets(targets, self.num_classes, logits.device)
        levels = self.anchors.on(features)
        anchors = torch.cat(levels)
        matched, total = self.match(truth, levels)
        picture, anchor = (matched >= 0).nonzero(as_tuple=True)
        row = truth.rows(matched)[picture, anchor]
        chosen, distributions = anchors[anchor], sides[picture, anchor]
        stride = self._stride(chosen)
        boxes = truth.boxes[row] / stride
        ours = self.boxes_of(distributions, chosen) / stride

        quality = torch.zeros_like(logits)
        quality[picture, anchor, truth.labels[row]] = det.paired_iou(ours.detach(), boxes)
        loss_cls = quality_focal_loss(logits, quality, self.quality_gamma).sum()

        weight = logits[picture, anchor].detach().sigmoid().amax(1)
        centre = (chosen[:, :2] + chosen[:, 2:]) / 2 / stride
        wanted = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], 1).clamp(0, self.max_distance - 0.1)
        each = IOU_LOSSES[self.box_loss](ours, boxes, reduction='none')
        spread = distribution_focal_loss(distributions.unflatten(1, (4, -1)).flatten(0, 1), wanted.flatten())
        shared = weight.sum().clamp(min=1)
        return {
            'loss_cls': loss_cls / total,
            'loss_box': self.box_weight * (each * weight).sum() / shared,
            'loss_distribution': self.distribution_weight * (spread.view(-1, 4).mean(1) * weight).sum() / shared,
        }

    def candidates(self, features: Sequence[Tensor]) -> Candidates:
        logits, sides = (x.float() for x in self(features))
        return Candidates(logits.sigmoid(), None, sides)

    def boxes_of(self, offsets: Tensor, anchors: Tensor) -> Tensor:
        steps = torch.arange(self.max_distance + 1, device=offsets.device, dtype=offsets.dtype)
        distance = (offsets.unflatten(1, (4, -1)).softmax(-1) * steps).sum(-1) * self._stride(anchors)  # (M, 4)
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2
        return torch.cat([centre - distance[:, :2], centre + distance[:, 2:]], 1)

    def _stride(self, anchors: Tensor) -> Tensor:
        """(M, 1): anchors are `anchor_scale` strides wide."""
        return (anchors[:, 2:3] - anchors[:, :1]) / self.anchor_scale


def quality_focal_loss(logits: Tensor, quality: Tensor, gamma: float) -> Tensor:
    """|quality - sigmoid|^gamma * cross entropy with the quality (0 for negatives), elementwise; the factor is part of
    the gradient."""
    each = F.binary_cross_entropy_with_logits(logits, quality, reduction='none')
    return (quality - logits.sigmoid()).abs() ** gamma * each


def distribution_focal_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """Cross entropy with the two whole distances around each: logits (S, R + 1), distances (S,) in [0, R) -> (S,)."""
    below = distance.long()
    share = distance - below
    return F.cross_entropy(logits, below, reduction='none') * (1 - share) + (
        F.cross_entropy(logits, below + 1, reduction='none') * share
    )
