"""RetinaNet: Focal Loss for Dense Object Detection (Lin et al. 2017, arXiv:1708.02002), on torchvision's RetinaNetHead.

Keys are those of torchvision's RetinaNet (head.classification_head..., head.regression_head...).
Differs from torchvision: labels are 0..K-1 (there, label 0 of COCO is never used); boxes that clipping leaves empty
are dropped (min_size=-1 keeps them); anchors are matched for the whole batch at once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import (
    clip_boxes_to_image,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)
from torchvision.ops.misc import Conv2dNormActivation

from . import detection as det
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, choose, norm_layer, positive

_IOU_LOSSES = {'giou': generalized_box_iou_loss, 'diou': distance_box_iou_loss, 'ciou': complete_box_iou_loss}


class RetinaNet(nn.Module):
    """Anchor-based one-stage detector on maps of one width (an FPN's).

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; labels are 0..K-1.
        channels: width of the towers (default: the maps').
        num_convs: convolutions of each tower.
        norm: 'none' (published) or 'group' in the towers.
        anchor_scale: anchors of a level are anchor_scale * stride * 2^(0, 1/3, 2/3) pixels large.
        anchor_sizes: sizes per level instead, for instance ((32, 40, 50), (64, 80, 101)).
        aspect_ratios: height / width.
        anchor_offset, exact_strides: placement of the anchors, see detection.PyramidAnchors.
        foreground_iou, background_iou: anchors from the first on are positive, below the second negative, else ignored.
        box_loss: 'l1' on encoded offsets (torchvision), or 'giou', 'diou', 'ciou' on decoded boxes.
        box_weight: factor of the box loss.
        focal_alpha, focal_gamma: of the focal loss.
        prior: initial score of every class.
        score_threshold, nms_threshold, topk, detections: decoding: scores above, NMS at this IoU, candidates per level
            before it, results per picture.
        min_size: boxes with a side of at most so many pixels are dropped; negative keeps all.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int | None = None,
        num_convs: int = 4,
        norm: str = 'none',
        anchor_scale: float = 4.0,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_offset: float = 0.0,
        exact_strides: bool = False,
        foreground_iou: float = 0.5,
        background_iou: float = 0.4,
        box_loss: str = 'l1',
        box_weight: float = 1.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        prior: float = 0.01,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        topk: int = 1000,
        detections: int = 100,
        min_size: float = 0.0,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        det.check_thresholds(
            foreground_iou=foreground_iou,
            background_iou=background_iou,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
        )
        if background_iou > foreground_iou:
            raise ValueError(f'background_iou must not exceed foreground_iou={foreground_iou}, got {background_iou}')
        self.foreground_iou, self.background_iou = foreground_iou, background_iou
        self.box_loss, self.box_weight = choose('box_loss', box_loss, ('l1', *_IOU_LOSSES)), box_weight
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.topk, self.detections, self.min_size = positive('topk', topk), positive('detections', detections), min_size

        if anchor_sizes is None:
            # torchvision truncates to whole pixels: 32, 40, 50 at stride 8.
            anchor_sizes = [
                [int(anchor_scale * stride * 2 ** (i / 3)) for i in range(3)] for stride in self.inputs.reduction()
            ]
        self.anchors = det.PyramidAnchors(
            info=self.inputs,
            sizes=anchor_sizes,
            aspect_ratios=aspect_ratios,
            offset=anchor_offset,
            exact_strides=exact_strides,
        )
        width = self.inputs.same_channels('RetinaNet')
        channels = positive('channels', width if channels is None else channels)
        self.head = RetinaNetHead(channels, self.anchors.per_location(), num_classes)
        for part in (self.head.classification_head, self.head.regression_head):
            part.conv = _tower(width, channels, num_convs, norm)
        nn.init.constant_(self.head.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> class logits (B, N, K), box offsets (B, N, 4); anchors are self.anchors.on(features)."""
        self.inputs.check(features)
        out = self.head(list(features))
        return out['cls_logits'], out['bbox_regression']

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_cls', 'loss_box'}: sums per picture over its positive anchors (at least 1), averaged over pictures."""
        logits, offsets = (x.float() for x in self(features))
        truth = det.gather_targets(targets, self.num_classes, logits.device)
        anchors = torch.cat(self.anchors.on(features))
        matched = det.match_by_iou(truth, anchors, high=self.foreground_iou, low=self.background_iou, low_quality=True)
        share = 1 / ((matched >= 0).sum(1).clamp(min=1) * len(targets))  # (B,)
        picture, anchor = (matched >= 0).nonzero(as_tuple=True)
        row = truth.rows(matched)[picture, anchor]

        wanted = torch.zeros_like(logits)
        wanted[picture, anchor, truth.labels[row]] = 1
        focal = sigmoid_focal_loss(logits, wanted, self.focal_alpha, self.focal_gamma, reduction='none').sum(2)
        loss_cls = (focal * (matched != det.IGNORED) * share[:, None]).sum()
        each = self._box_losses(offsets[picture, anchor], anchors[anchor], truth.boxes[row])
        return {'loss_cls': loss_cls, 'loss_box': self.box_weight * (each * share[picture]).sum()}

    def _box_losses(self, offsets: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        if self.box_loss == 'l1':
            return (offsets - self.box_coder.encode_single(boxes, anchors)).abs().sum(1)
        return _IOU_LOSSES[self.box_loss](self.box_coder.decode_single(offsets, anchors), boxes, reduction='none')

    def decode(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates before NMS, of fixed number M, for exported graphs: boxes (B, M, 4) xyxy in pixels of the padded
        batch, clipped to it, scores (B, M), labels (B, M) int64. M is at most topk per level, best first in each."""
        logits, offsets = (x.float() for x in self(features))
        levels = self.anchors.on(features)
        offsets, anchors, scores, labels = det.top_candidates(
            logits.sigmoid(), offsets, torch.cat(levels), det.level_sizes(levels), self.topk
        )
        boxes = self.box_coder.decode_single(offsets.flatten(0, 1), anchors.flatten(0, 1)).view(offsets.shape)
        return clip_boxes_to_image(boxes, self.inputs.padded_size(features)), scores, labels

    def predict(
        self, features: Sequence[Tensor], sizes: Sequence[Size], original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """One {'boxes' (n, 4) xyxy, 'scores' (n,), 'labels' (n,)} per picture, best first, inside its valid size."""
        logits, offsets = (x.float() for x in self(features))
        check_sizes(sizes, len(logits), self.inputs.padded_size(features), original_sizes)
        levels = self.anchors.on(features)
        anchors, lengths = torch.cat(levels), det.level_sizes(levels)
        scores = logits.sigmoid()
        results = []
        for i, size in enumerate(sizes):
            valid = scores[i] * det.centres_inside(anchors, size)[:, None]
            anchor, label, score = det.select_candidates(valid, lengths, self.score_threshold, self.topk)
            boxes = self.box_coder.decode_single(offsets[i, anchor], anchors[anchor])
            results.append(
                det.finish(
                    boxes,
                    score,
                    label,
                    size,
                    original_sizes[i] if original_sizes else None,
                    nms=self.nms_threshold,
                    limit=self.detections,
                    min_size=self.min_size,
                )
            )
        return results


def _tower(in_channels: int, channels: int, num_convs: int, norm: str) -> nn.Sequential:
    """3x3 convolutions with ReLU, initialised as torchvision's (normal, std 0.01)."""
    layer = norm_layer(choose('norm', norm, ('none', 'group')))
    if num_convs < 1 and in_channels != channels:
        raise ValueError(f"num_convs=0 needs channels equal to the maps' width {in_channels}, got channels={channels}")
    tower = nn.Sequential(
        *[
            Conv2dNormActivation(in_channels if i == 0 else channels, channels, norm_layer=layer)
            for i in range(num_convs)
        ]
    )
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return tower
