"""RetinaNet: Focal Loss for Dense Object Detection (Lin et al. 2017, arXiv:1708.02002), on torchvision's RetinaNetHead.

Keys are those of torchvision's RetinaNet (head.classification_head..., head.regression_head...); `convert` takes
MMDetection's RetinaHead, whose numbers RetinaNet(**MMDETECTION, ...) gives.
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
from torchvision.ops import sigmoid_focal_loss

from . import detection as det
from .one_stage import IOU_LOSSES, Candidates, OneStage, tower
from .pyramid import FeatureInfo, choose, positive
from .renaming import rename

# What MMDetection's RetinaHead computes otherwise than torchvision.
MMDETECTION: dict[str, Any] = {
    'exact_strides': True,
    'exact_sizes': True,
    'low_quality': 'box',
    'average': 'batch',
}


class RetinaNet(OneStage):
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
        anchor_offset, exact_strides, exact_sizes: the anchors, see detection.PyramidAnchors; with exact_sizes sizes
            that come from anchor_scale are not cut to whole pixels either.
        foreground_iou, background_iou: anchors from the first on are positive, below the second negative, else ignored.
        low_quality: 'best' or 'box', whose a box's best anchors are, see detection.match_by_iou.
        average: losses are averaged over each picture's positive anchors, then over pictures ('picture'), or over those
            of the batch at once ('batch').
        box_loss: 'l1' on encoded offsets (torchvision), or 'iou', 'giou', 'diou', 'ciou' on decoded boxes.
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
        exact_sizes: bool = False,
        foreground_iou: float = 0.5,
        background_iou: float = 0.4,
        low_quality: str = 'best',
        average: str = 'picture',
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
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            topk=topk,
            detections=detections,
            min_size=min_size,
        )
        det.check_thresholds(foreground_iou=foreground_iou, background_iou=background_iou)
        if background_iou > foreground_iou:
            raise ValueError(f'background_iou must not exceed foreground_iou={foreground_iou}, got {background_iou}')
        self.foreground_iou, self.background_iou = foreground_iou, background_iou
        self.low_quality = choose('low_quality', low_quality, ('best', 'box'))
        self.average = choose('average', average, ('picture', 'batch'))
        self.box_loss, self.box_weight = choose('box_loss', box_loss, ('l1', *IOU_LOSSES)), box_weight
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma

        if anchor_sizes is None:
            anchor_sizes = [
                [anchor_scale * stride * 2 ** (i / 3) for i in range(3)] for stride in self.inputs.reduction()
            ]
            if not exact_sizes:  # torchvision truncates to whole pixels: 32, 40, 50 at stride 8
                anchor_sizes = [[int(size) for size in level] for level in anchor_sizes]
        self.anchors = det.PyramidAnchors(
            info=self.inputs,
            sizes=anchor_sizes,
            aspect_ratios=aspect_ratios,
            offset=anchor_offset,
            exact_strides=exact_strides,
            exact_sizes=exact_sizes,
        )
        width = self.inputs.same_channels('RetinaNet')
        channels = positive('channels', width if channels is None else channels)
        self.head = RetinaNetHead(channels, self.anchors.per_location(), num_classes)
        for part in (self.head.classification_head, self.head.regression_head):
            part.conv = tower(width, channels, num_convs, norm)
        nn.init.constant_(self.head.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> class logits (B, N, K), box offsets (B, N, 4); anchors are self.anchors.on(features)."""
        self.inputs.check(features)
        out = self.head(list(features))
        return out['cls_logits'], out['bbox_regression']

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_cls', 'loss_box'}, see `average`; a picture without positive anchors counts as one."""
        logits, offsets = (x.float() for x in self(features))
        truth = det.gather_targets(targets, self.num_classes, logits.device)
        anchors = torch.cat(self.anchors.on(features))
        matched = det.match_by_iou(
            truth, anchors, high=self.foreground_iou, low=self.background_iou, low_quality=self.low_quality
        )
        counts = (matched >= 0).sum(1).clamp(min=1)  # (B,)
        share = 1 / (counts * len(targets) if self.average == 'picture' else counts.sum().expand_as(counts))
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
        return IOU_LOSSES[self.box_loss](self.box_coder.decode_single(offsets, anchors), boxes, reduction='none')

    def candidates(self, features: Sequence[Tensor]) -> Candidates:
        logits, offsets = (x.float() for x in self(features))
        return Candidates(logits.sigmoid(), None, offsets)

    def boxes_of(self, offsets: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode_single(offsets, anchors)


_RENAMES = (
    (r'^bbox_head\.', ''),
    (r'^(cls|reg)_convs\.(\d+)\.conv\.', r'retina_\1.conv.\2.0.'),
    (r'^(cls|reg)_convs\.(\d+)\.(gn|bn)\.', r'retina_\1.conv.\2.1.'),
    (r'^retina_cls\.(?=weight|bias)', 'retina_cls.cls_logits.'),
    (r'^retina_reg\.(?=weight|bias)', 'retina_reg.bbox_reg.'),
    (r'^retina_cls\.', 'head.classification_head.'),
    (r'^retina_reg\.', 'head.regression_head.'),
)


def convert(state: dict[str, Any]) -> dict[str, Any]:
    """The head's entries of a state dict under the names of MMDetection's RetinaHead, renamed to torchvision's."""
    return {rename(key, _RENAMES): value for key, value in state.items()}
