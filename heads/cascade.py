"""Cascade R-CNN (Cai and Vasconcelos 2017, arXiv:1712.00726; with masks 2019, arXiv:1906.09756): three stages of boxes,
each trained on the boxes of the one before at a higher IoU.

Written from the paper, on MaskRCNN (torchvision's RPN and RoIHeads). Boxes are moved alike for all classes; scores of a
result are the mean over stages. Keys: rpn.head..., stages.i.head..., stages.i.predictor..., roi_heads.mask_....
Differs: one mask branch, on the boxes of the last stage (as in Detectron2; MMDetection has one for each stage);
proposals are sampled once and matched anew in every stage.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import box_iou, clip_boxes_to_image

from . import detection as det
from .maskrcnn import MaskRCNN
from .pyramid import FeatureInfo, Size, positive

# R boxes of the batch, K classes


class Stage(nn.Module):
    """Two fully connected layers, K + 1 classes (background 0), one offset for all classes.

    Args:
        in_channels: of a flattened cut.
        channels: width of the two layers.
        num_classes: K.
        iou: from which on a box is one of an object.
        precision: factor of the box coder's weights: later stages move boxes less.
    """

    def __init__(self, *, in_channels: int, channels: int, num_classes: int, iou: float, precision: float):
        super().__init__()
        self.head = TwoMLPHead(in_channels, channels)
        self.cls_score = nn.Linear(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4)
        self.iou = iou
        self.coder = BoxCoder(weights=(10.0 * precision, 10.0 * precision, 5.0 * precision, 5.0 * precision))

    def forward(self, cut: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, P, P) -> logits (R, K + 1), offsets (R, 4), float32."""
        x = self.head(cut)
        return self.cls_score(x).float(), self.bbox_pred(x).float()

    def match(self, boxes: Tensor, truth: Tensor) -> Tensor:
        """Boxes (n, 4) and objects (m, 4) of one picture -> (n,) the object of each box, -1 for background."""
        if not len(truth) or not len(boxes):
            return torch.full((len(boxes),), -1, device=boxes.device)
        best, index = box_iou(boxes, truth).max(1)
        return torch.where(best >= self.iou, index, -1)


class CascadeRCNN(MaskRCNN):
    """Cascade R-CNN, or Cascade Mask R-CNN (masks=True), on maps of one width (an FPN's; extra='maxpool').

    Args:
        stage_ious: IoU from which on a box is an object's, for each stage.
        stage_weights: of each stage's losses.
        all others: see MaskRCNN; roi_foreground_iou is the first of stage_ious.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        masks: bool = True,
        stage_ious: Sequence[float] = (0.5, 0.6, 0.7),
        stage_weights: Sequence[float] = (1.0, 0.5, 0.25),
        anchor_scale: float = 8.0,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        anchor_offset: float = 0.0,
        exact_strides: bool = False,
        rpn_convs: int = 1,
        rpn_pre_nms: tuple[int, int] = (2000, 1000),
        rpn_post_nms: tuple[int, int] = (2000, 1000),
        rpn_nms_threshold: float = 0.7,
        rpn_foreground_iou: float = 0.7,
        rpn_background_iou: float = 0.3,
        rpn_batch: int = 256,
        rpn_positive: float = 0.5,
        roi_levels: Sequence[int] | None = None,
        roi_scale: float = 224.0,
        box_pool: int = 7,
        box_channels: int = 1024,
        roi_batch: int = 512,
        roi_positive: float = 0.25,
        mask_pool: int = 14,
        mask_channels: int = 256,
        mask_convs: int = 4,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        mask_threshold: float | None = 0.5,
    ):
        if not stage_ious or len(stage_ious) != len(stage_weights):
            raise ValueError(
                f'stage_ious and stage_weights need one value per stage, got {stage_ious}, {stage_weights}'
            )
        det.check_thresholds(stage_ious=min(stage_ious), largest_stage_iou=max(stage_ious))
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            masks=masks,
            anchor_scale=anchor_scale,
            anchor_sizes=anchor_sizes,
            aspect_ratios=aspect_ratios,
            anchor_offset=anchor_offset,
            exact_strides=exact_strides,
            rpn_convs=rpn_convs,
            rpn_pre_nms=rpn_pre_nms,
            rpn_post_nms=rpn_post_nms,
            rpn_nms_threshold=rpn_nms_threshold,
            rpn_foreground_iou=rpn_foreground_iou,
            rpn_background_iou=rpn_background_iou,
            rpn_batch=rpn_batch,
            rpn_positive=rpn_positive,
            roi_levels=roi_levels,
            roi_scale=roi_scale,
            box_pool=box_pool,
            box_channels=positive('box_channels', box_channels),
            roi_foreground_iou=stage_ious[0],
            roi_batch=roi_batch,
            roi_positive=roi_positive,
            mask_pool=mask_pool,
            mask_channels=mask_channels,
            mask_convs=mask_convs,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            detections=detections,
            mask_threshold=mask_threshold,
        )
        # The stages take the place of the one second stage.
        self.roi_heads.box_head = nn.Identity()
        self.roi_heads.box_predictor = nn.Identity()
        self.stage_weights = list(stage_weights)
        self.stages: Any = nn.ModuleList(
            Stage(
                in_channels=self.inputs.channels()[0] * box_pool**2,
                channels=box_channels,
                num_classes=num_classes,
                iou=iou,
                precision=i + 1.0,
            )
            for i, iou in enumerate(stage_ious)
        )

    def box_losses(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        parts: list[dict[str, Tensor]],
        sizes: list[Size],
        losses: dict[str, Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As MaskRCNN's: 'loss_classifier_0', 'loss_box_reg_0' ... of each stage."""
        heads = self.roi_heads
        boxes, matched, labels, _ = heads.select_training_samples(proposals, parts)
        for i, stage in enumerate(self.stages):
            if i:
                found = [stage.match(b, part['boxes']) for b, part in zip(boxes, parts)]
                matched = [m.clamp(min=0) for m in found]
                labels = [
                    torch.where(f >= 0, part['labels'][m], 0) if len(part['labels']) else torch.zeros_like(m)
                    for f, m, part in zip(found, matched, parts)
                ]
            wanted = [
                part['boxes'][m] if len(part['boxes']) else b.new_zeros(len(b), 4)
                for m, b, part in zip(matched, boxes, parts)
            ]
            logits, offsets = stage(heads.box_roi_pool(maps, boxes, sizes))
            losses.update(self._stage_losses(i, stage, logits, offsets, boxes, labels, wanted))
            if i + 1 < len(self.stages):
                boxes = _moved(stage, offsets.detach(), boxes, sizes)
        return boxes, matched, labels

    def _stage_losses(
        self,
        index: int,
        stage: Stage,
        logits: Tensor,
        offsets: Tensor,
        boxes: list[Tensor],
        labels: list[Tensor],
        wanted: list[Tensor],
    ) -> dict[str, Tensor]:
        label = torch.cat(labels)
        chosen = label > 0
        target = stage.coder.encode_single(torch.cat(wanted)[chosen], torch.cat(boxes)[chosen])
        weight, count = self.stage_weights[index], max(len(label), 1)
        box = F.smooth_l1_loss(offsets[chosen], target, beta=1 / 9, reduction='sum')
        return {
            f'loss_classifier_{index}': weight * F.cross_entropy(logits, label, reduction='sum') / count,
            f'loss_box_reg_{index}': weight * box / count,
        }

    def detect(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: list[Size]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        heads, boxes = self.roi_heads, proposals
        total: Tensor | None = None
        for stage in self.stages:
            logits, offsets = stage(heads.box_roi_pool(maps, boxes, sizes))
            total = logits.softmax(-1) if total is None else total + logits.softmax(-1)
            boxes = _moved(stage, offsets, boxes, sizes)
        assert total is not None
        results = []
        for box, score, size in zip(boxes, (total / len(self.stages)).split([len(b) for b in boxes]), sizes):
            row, label = (score[:, 1:] > heads.score_thresh).nonzero(as_tuple=True)
            results.append(
                det.finish(
                    box[row],
                    score[row, label + 1],
                    label,
                    size,
                    None,
                    nms=heads.nms_thresh,
                    limit=heads.detections_per_img,
                    min_size=1e-2,
                )
            )
        return [r['boxes'] for r in results], [r['scores'] for r in results], [r['labels'] + 1 for r in results]

    def detect_equal(self, features: Sequence[Tensor], proposals: Tensor) -> tuple[Tensor, Tensor]:
        batch, count = proposals.shape[:2]
        boxes, padded = proposals, self.inputs.padded_size(features)
        maps = list(self._roi_maps(features).values())
        total: Tensor | None = None
        for stage in self.stages:
            cut = self.roi_heads.box_roi_pool.cut_equal(maps, boxes)
            logits, offsets = stage(cut.to(features[0].dtype))
            total = logits.softmax(-1) if total is None else total + logits.softmax(-1)
            moved = stage.coder.decode_single(offsets, boxes.flatten(0, 1))
            boxes = clip_boxes_to_image(moved, padded).view(proposals.shape)
        assert total is not None
        scores = (total / len(self.stages)).view(batch, count, -1)[..., 1:]
        return scores, boxes[:, :, None].expand(-1, -1, self.num_classes, -1)


def _moved(stage: Stage, offsets: Tensor, boxes: list[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
    """Each picture's boxes after a stage, inside the picture."""
    moved = stage.coder.decode_single(offsets, torch.cat(boxes)).split([len(b) for b in boxes])
    return [clip_boxes_to_image(b, size) for b, size in zip(moved, sizes)]
