"""What one-stage detectors on anchors or points share: towers, candidates, decoding with suppression."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import (
    clip_boxes_to_image,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)
from torchvision.ops.misc import Conv2dNormActivation

from . import detection as det
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, choose, norm_layer, positive

# B pictures, K classes, N anchors of all levels, M candidates, A anchors per location


def iou_loss(boxes: Tensor, others: Tensor, reduction: str) -> Tensor:
    """UnitBox (Yu et al. 2016, arXiv:1608.01471): -log of the IoU (at least 1e-6) of row with row, (T, 4), (T, 4) ->
    (T,); reduction is 'none', as the other losses need."""
    assert reduction == 'none'
    return -det.paired_iou(boxes, others).clamp(min=1e-6).log()


IOU_LOSSES: dict[str, Callable[..., Tensor]] = {
    'iou': iou_loss,
    'giou': generalized_box_iou_loss,
    'diou': distance_box_iou_loss,
    'ciou': complete_box_iou_loss,
}


class Candidates(NamedTuple):
    """scores (B, N, K), by which candidates are chosen; factors (B, N) that multiply them afterwards, or None;
    offsets (B, N, ...) of boxes."""

    scores: Tensor
    factors: Tensor | None
    offsets: Tensor


class OneStage(nn.Module):
    """A detector with anchors (or points) on all levels; subclasses give `candidates` and `boxes_of`.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; labels are 0..K-1.
        score_threshold, nms_threshold, topk, detections: decoding: scores above, NMS at this IoU, candidates per level
            before it, results per picture.
        min_size: boxes with a side of at most so many pixels are dropped; negative keeps all.
    """

    anchors: det.PyramidAnchors

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        score_threshold: float,
        nms_threshold: float,
        topk: int,
        detections: int,
        min_size: float,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        det.check_thresholds(score_threshold=score_threshold, nms_threshold=nms_threshold)
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.topk, self.detections, self.min_size = positive('topk', topk), positive('detections', detections), min_size

    def candidates(self, features: Sequence[Tensor]) -> Candidates:
        """List of maps -> float32 candidates of every anchor."""
        raise NotImplementedError

    def boxes_of(self, offsets: Tensor, anchors: Tensor) -> Tensor:
        """Offsets (M, ...) and their anchors (M, 4) -> boxes (M, 4) xyxy in pixels."""
        raise NotImplementedError

    def decode(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates before NMS, of fixed number M, for exported graphs: boxes (B, M, 4) xyxy in pixels of the padded
        batch, clipped to it, scores (B, M), labels (B, M) int64. M is at most topk per level, best first in each."""
        found = self.candidates(features)
        levels = self.anchors.on(features)
        index, scores, labels = det.top_candidates(found.scores, det.level_sizes(levels), self.topk)
        anchors = det.pick(torch.cat(levels).expand(scores.shape[0], -1, -1), index)
        offsets = det.pick(found.offsets, index)
        boxes = self.boxes_of(offsets.flatten(0, 1), anchors.flatten(0, 1)).view(anchors.shape)
        if found.factors is not None:
            scores = scores * found.factors.gather(1, index)
        return clip_boxes_to_image(boxes, self.inputs.padded_size(features)), scores, labels

    def predict(
        self, features: Sequence[Tensor], sizes: Sequence[Size], original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """One {'boxes' (n, 4) xyxy, 'scores' (n,), 'labels' (n,)} per picture, best first, inside its valid size."""
        found = self.candidates(features)
        check_sizes(sizes, len(found.scores), self.inputs.padded_size(features), original_sizes)
        levels = self.anchors.on(features)
        anchors, lengths = torch.cat(levels), det.level_sizes(levels)
        results = []
        for i, size in enumerate(sizes):
            valid = found.scores[i] * det.centres_inside(anchors, size)[:, None]
            anchor, label, score = det.select_candidates(valid, lengths, self.score_threshold, self.topk)
            if found.factors is not None:
                score = score * found.factors[i, anchor]
            results.append(
                det.finish(
                    self.boxes_of(found.offsets[i, anchor], anchors[anchor]),
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


class Scale(nn.Module):
    """A learnable factor."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def tower(in_channels: int, channels: int, num_convs: int, norm: str) -> nn.Sequential:
    """3x3 convolutions with ReLU, initialised as torchvision's (normal, std 0.01)."""
    layer = norm_layer(choose('norm', norm, ('none', 'group')))
    if num_convs < 1 and in_channels != channels:
        raise ValueError(f"num_convs=0 needs channels equal to the maps' width {in_channels}, got channels={channels}")
    convs = nn.Sequential(
        *[
            Conv2dNormActivation(in_channels if i == 0 else channels, channels, norm_layer=layer)
            for i in range(num_convs)
        ]
    )
    for module in convs.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return convs


def by_location(maps: Sequence[Tensor], width: int) -> Tensor:
    """Maps (B, A * width, h, w) of all levels -> (B, N, width), location-major as the anchors are."""
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 3).unflatten(1, (-1, width)) for x in maps], 1)
