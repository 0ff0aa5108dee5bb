"""Mask R-CNN (He et al. 2017, arXiv:1703.06870), or Faster R-CNN (masks=False), on torchvision's RPN and RoIHeads.

Keys are those of torchvision's MaskRCNN (rpn.head..., roi_heads.box_head..., roi_heads.mask_predictor...), with its
K + 1 classes: background is class 0 inside, while labels outside are 0..K-1.
Targets: dicts with `boxes`, `labels`, (masks=True) `masks` (N, H, W) bool, and `size` (h, w) where the picture is
smaller than the padded batch.
Differs from torchvision: scales of the maps come from feature_info (there they are guessed from the first batch,
wrongly where a picture is smaller than the padded batch); boxes without area are left out of training; results carry
bool masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image

from ..kernels import suppress_by_products
from . import detection as det
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, positive
from .roi_align import RoIAlign


class MaskRCNN(nn.Module):
    """Two-stage detector on maps of one width (an FPN's; extra='maxpool' is customary).

    Args:
        feature_info: channels and strides of the maps; proposals come from all of them.
        num_classes: K, without background; labels are 0..K-1.
        masks: False leaves the mask branch out (Faster R-CNN).
        anchor_scale: one anchor size per level, anchor_scale * stride pixels.
        anchor_sizes: sizes per level instead, for instance ((24,), (48,)).
        aspect_ratios: height / width.
        anchor_offset, exact_strides: placement of the anchors, see detection.PyramidAnchors.
        rpn_convs: 3x3 convolutions of the proposal head.
        rpn_pre_nms, rpn_post_nms: proposals per level before and per picture after NMS, (training, evaluation).
        rpn_nms_threshold, rpn_foreground_iou, rpn_background_iou, rpn_batch, rpn_positive: proposals' NMS, matching,
            anchors sampled per picture for the loss and the positive fraction of them.
        roi_levels: indices of the maps that boxes are cut from (default: those of stride 32 and less).
        roi_scale: a box of roi_scale pixels is cut from the map of stride 16, one half as large from stride 8.
        box_pool, box_channels: side of the cut for boxes, width of the two fully connected layers.
        roi_foreground_iou, roi_batch, roi_positive: matching and sampling of proposals for the second stage.
        mask_pool, mask_channels, mask_convs: side of the cut for masks (masks are twice as large), width and number
            of convolutions.
        score_threshold, nms_threshold, detections: decoding.
        mask_threshold: masks are True from this probability on; None returns the probabilities (float) instead.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        masks: bool = True,
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
        roi_foreground_iou: float = 0.5,
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
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        self.masks, self.mask_threshold = masks, mask_threshold
        det.check_thresholds(
            rpn_nms_threshold=rpn_nms_threshold,
            rpn_foreground_iou=rpn_foreground_iou,
            rpn_background_iou=rpn_background_iou,
            rpn_positive=rpn_positive,
            roi_foreground_iou=roi_foreground_iou,
            roi_positive=roi_positive,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            mask_threshold=0.0 if mask_threshold is None else mask_threshold,
        )
        width, strides = self.inputs.same_channels('MaskRCNN'), self.inputs.reduction()

        if anchor_sizes is None:
            anchor_sizes = [(int(anchor_scale * stride),) for stride in strides]
        anchors = det.PyramidAnchors(
            info=self.inputs,
            sizes=anchor_sizes,
            aspect_ratios=aspect_ratios,
            offset=anchor_offset,
            exact_strides=exact_strides,
        )
        self.rpn = Proposals(
            anchors,
            RPNHead(width, anchors.per_location(), conv_depth=rpn_convs),
            rpn_foreground_iou,
            rpn_background_iou,
            positive('rpn_batch', rpn_batch),
            rpn_positive,
            {'training': rpn_pre_nms[0], 'testing': rpn_pre_nms[1]},
            {'training': rpn_post_nms[0], 'testing': rpn_post_nms[1]},
            rpn_nms_threshold,
        )

        if roi_levels is None:
            roi_levels = [i for i, stride in enumerate(strides) if stride <= 32] or [0]
        if not roi_levels or min(roi_levels) < 0 or max(roi_levels) >= len(strides):
            raise ValueError(f'roi_levels must be indices of the {len(strides)} maps, got {tuple(roi_levels)}')
        self.roi_levels = sorted(roi_levels)
        roi_strides = [strides[i] for i in self.roi_levels]
        classes = num_classes + 1
        mask_parts: list[nn.Module] = []
        if masks:
            cut = RoIAlign(strides=roi_strides, side=positive('mask_pool', mask_pool), canonical_scale=roi_scale)
            mask_parts = [
                cut,
                MaskRCNNHeads(width, [positive('mask_channels', mask_channels)] * mask_convs, 1),
                MaskRCNNPredictor(mask_channels if mask_convs else width, mask_channels, classes),
            ]
        self.roi_heads = RoIHeads(
            RoIAlign(strides=roi_strides, side=positive('box_pool', box_pool), canonical_scale=roi_scale),
            TwoMLPHead(width * box_pool**2, positive('box_channels', box_channels)),
            FastRCNNPredictor(box_channels, classes),
            roi_foreground_iou,
            roi_foreground_iou,
            positive('roi_batch', roi_batch),
            roi_positive,
            None,
            score_threshold,
            nms_threshold,
            positive('detections', detections),
            *mask_parts,
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> the first stage's objectness (B, N) and box offsets (B, N, 4), N anchors of all levels.

        This is the part with fixed shapes, which exports; `predict` adds the second stage.
        """
        self.inputs.check(features)
        objectness, offsets = self.rpn.head(list(features))
        objectness, offsets = concat_box_prediction_layers(objectness, offsets)
        batch = features[0].shape[0]
        return objectness.view(batch, -1), offsets.view(batch, -1, 4)

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg', 'loss_mask'}."""
        objectness, offsets = (x.float() for x in self(features))
        padded = self.inputs.padded_size(features)
        inside = [self._inside_target(t, i, padded) for i, t in enumerate(targets)]
        truth = det.gather_targets(inside, self.num_classes, objectness.device)
        sizes = [det.pair(t.get('size', padded)) for t in targets]
        proposals, losses = self.rpn.propose(features, objectness, offsets, sizes, truth)
        # Background is class 0 from here on.
        split = zip(truth.real.split(truth.counts), truth.labels[:-1].split(truth.counts), inside)
        parts = [
            {'boxes': boxes, 'labels': labels + 1, **({'masks': t['masks']} if self.masks else {})}
            for boxes, labels, t in split
        ]

        heads, maps = self.roi_heads, self._roi_maps(features)
        proposals, matched, labels = self.box_losses(maps, proposals, parts, sizes, losses)
        if self.masks:
            chosen = [torch.where(x > 0)[0] for x in labels]
            boxes = [p[i] for p, i in zip(proposals, chosen)]
            soft = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes)))
            losses['loss_mask'] = maskrcnn_loss(
                soft.float(),
                boxes,
                [p['masks'] for p in parts],
                [p['labels'] for p in parts],
                [m[i] for m, i in zip(matched, chosen)],
            )
        return losses

    def box_losses(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        parts: list[dict[str, Tensor]],
        sizes: list[Size],
        losses: dict[str, Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Adds the second stage's losses of boxes; gives what masks are trained on: boxes of each picture, their
        objects and labels (0 background)."""
        heads = self.roi_heads
        proposals, matched, labels, box_targets = heads.select_training_samples(proposals, parts)
        logits, box_offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, sizes)))
        if sum(len(x) for x in labels):
            loss_classifier, loss_box = fastrcnn_loss(logits.float(), box_offsets.float(), labels, box_targets)
        else:
            loss_classifier, loss_box = logits.sum() * 0, box_offsets.sum() * 0
        losses.update(loss_classifier=loss_classifier, loss_box_reg=loss_box)
        return proposals, matched, labels

    def detect(
        self, maps: dict[str, Tensor], proposals: list[Tensor], sizes: list[Size]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Proposals of each picture -> boxes, scores and labels (from 1) after suppression."""
        heads = self.roi_heads
        logits, box_offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, sizes)))
        return heads.postprocess_detections(logits.float(), box_offsets.float(), proposals, sizes)

    def detect_equal(self, features: Sequence[Tensor], proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals (B, R, 4) -> scores (B, R, K) and boxes (B, R, K, 4), in operations of known shapes."""
        heads = self.roi_heads
        cut = heads.box_roi_pool.cut_equal(list(self._roi_maps(features).values()), proposals)
        logits, deltas = heads.box_predictor(heads.box_head(cut.to(features[0].dtype)))
        batch, count = proposals.shape[:2]
        boxes = heads.box_coder.decode_single(deltas.float(), proposals.flatten(0, 1)).view(batch, count, -1, 4)
        return logits.float().softmax(-1).view(batch, count, -1)[..., 1:], boxes[:, :, 1:]

    def predict(
        self, features: Sequence[Tensor], sizes: Sequence[Size], original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """One {'boxes' (n, 4) xyxy, 'scores' (n,), 'labels' (n,), 'masks' (n, H, W) bool} per picture, best first."""
        objectness, offsets = (x.float() for x in self(features))
        check_sizes(sizes, len(objectness), self.inputs.padded_size(features), original_sizes)
        sizes = [det.pair(size) for size in sizes]
        heads, maps = self.roi_heads, self._roi_maps(features)
        proposals, _ = self.rpn.propose(features, objectness, offsets, sizes, None)
        boxes, scores, labels = self.detect(maps, proposals, sizes)
        shapes = [det.pair(size) for size in (original_sizes or sizes)]
        results = [
            {'boxes': det.rescale(b, size, shape), 'scores': s, 'labels': label - 1}
            for b, s, label, size, shape in zip(boxes, scores, labels, sizes, shapes)
        ]
        if self.masks:
            logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes)))
            for result, soft, shape in zip(results, maskrcnn_inference(logits.float(), labels), shapes):
                pasted = paste_masks_in_image(soft, result['boxes'], shape)[:, 0]
                result['masks'] = pasted if self.mask_threshold is None else pasted >= self.mask_threshold
        return results

    def decode(
        self, features: Sequence[Tensor], suppress: det.Suppress = suppress_by_products
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates before NMS, of fixed number M, for exported graphs: boxes (B, M, 4) xyxy in pixels of the padded
        batch, clipped to it, scores (B, M), labels (B, M) int64.

        Every picture has the same number of proposals; those that `suppress` would have dropped have the score 0, and
        so have their results.
        """
        objectness, offsets = (x.float() for x in self(features))
        padded = self.inputs.padded_size(features)
        proposals, real = self.rpn.propose_equal(features, objectness, offsets, padded, suppress)
        scores, boxes = self.detect_equal(features, proposals)
        scores = (scores * real[..., None]).flatten(1)
        scores, index = scores.topk(min(det.CANDIDATES, scores.shape[1]), 1)
        boxes = det.pick(boxes.flatten(1, 2), index)
        return clip_boxes_to_image(boxes, padded), scores, index % self.num_classes

    def decode_masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Boxes (B, D, 4) in pixels and labels (B, D) -> probabilities (B, D, 2 P, 2 P) on a grid over each box."""
        heads = self.roi_heads
        cut = heads.mask_roi_pool.cut_equal(list(self._roi_maps(features).values()), boxes)
        logits = heads.mask_predictor(heads.mask_head(cut.to(features[0].dtype))).float()
        side = logits.shape[-1]
        logits = logits.view(*labels.shape, -1, side, side)
        index = (labels + 1)[..., None, None, None].expand(-1, -1, 1, side, side)
        return logits.gather(2, index)[:, :, 0].sigmoid()

    def _roi_maps(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        return {str(i): features[level].float() for i, level in enumerate(self.roi_levels)}

    def _inside_target(self, target: Mapping[str, Any], index: int, padded: Size) -> dict[str, Tensor]:
        """Boxes with area, their labels and (masks=True) masks; ValueError where masks are missing or too large."""
        large = (target['boxes'][:, 2:] > target['boxes'][:, :2]).all(1)
        parts = {key: target[key][large] for key in ('boxes', 'labels')}
        if self.masks:
            if 'masks' not in target:
                raise ValueError(
                    f'targets[{index}] has no masks; ask the dataset for them (masks=True) or build '
                    'MaskRCNN(masks=False)'
                )
            masks = target['masks']
            if masks.ndim != 3 or len(masks) != len(large):
                raise ValueError(
                    f'targets[{index}] needs masks ({len(large)}, H, W), one per box, got {tuple(masks.shape)}'
                )
            parts['masks'] = masks[large.to(masks.device)].to(large.device)
        return parts


class Proposals(RegionProposalNetwork):
    """torchvision's RegionProposalNetwork with batched matching; keys and numbers are the same."""

    def propose(
        self,
        features: Sequence[Tensor],
        objectness: Tensor,
        offsets: Tensor,
        sizes: Sequence[Size],
        truth: det.GroundTruth | None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals (n, 4) per picture and, where there is `truth`, the first stage's losses."""
        levels = self.anchor_generator.on(features)
        anchors, batch = torch.cat(levels), len(objectness)
        # Anchors are shared, so offsets of all pictures decode against one copy each.
        tiled = anchors.expand(batch, -1, -1).reshape(-1, 4)
        decoded = self.box_coder.decode_single(offsets.detach().reshape(-1, 4), tiled).view(batch, -1, 4)
        boxes, _ = self.filter_proposals(decoded, objectness, list(sizes), det.level_sizes(levels))
        if truth is None:
            return boxes, {}
        matched = det.match_by_iou(
            truth,
            anchors,
            high=self.proposal_matcher.high_threshold,
            low=self.proposal_matcher.low_threshold,
        )
        labels = torch.where(matched >= 0, 1.0, torch.where(matched == det.IGNORED, -1.0, 0.0))
        positive, negative = self.fg_bg_sampler(list(labels))
        positive, negative = torch.stack(positive).bool(), torch.stack(negative).bool()
        sampled = positive | negative
        count = sampled.sum().clamp(min=1)
        picture, anchor = positive.nonzero(as_tuple=True)
        wanted = self.box_coder.encode_single(truth.boxes[truth.rows(matched)[picture, anchor]], anchors[anchor])
        box = nn.functional.smooth_l1_loss(offsets[picture, anchor], wanted, beta=1 / 9, reduction='sum')
        cls = nn.functional.binary_cross_entropy_with_logits(objectness[sampled], labels[sampled], reduction='sum')
        return boxes, {'loss_objectness': cls / count, 'loss_rpn_box_reg': box / count}

    def propose_equal(
        self, features: Sequence[Tensor], objectness: Tensor, offsets: Tensor, size: Size, suppress: det.Suppress
    ) -> tuple[Tensor, Tensor]:
        """Proposals (B, R, 4), equally many per picture, best first, and (B, R) 1 for real ones, 0 for suppressed."""
        kept, ranks, start = [], [], 0
        for anchors in self.anchor_generator.on(features):
            stop = start + len(anchors)
            score, index = objectness[:, start:stop].topk(min(self.pre_nms_top_n(), len(anchors)), 1)
            near = det.pick(anchors.expand(objectness.shape[0], -1, -1), index)
            moved = det.pick(offsets[:, start:stop], index)
            boxes = self.box_coder.decode_single(moved.flatten(0, 1), near.flatten(0, 1)).view(moved.shape)
            boxes = clip_boxes_to_image(boxes, size)
            large = ((boxes[..., 2:] - boxes[..., :2]) >= self.min_size).all(-1)
            score = torch.where(large, score.sigmoid(), -1.0)
            ranks.append(torch.where(suppress(boxes, score, self.nms_thresh), score, -1.0))
            kept.append(boxes)
            start = stop
        rank, index = torch.cat(ranks, 1).topk(min(self.post_nms_top_n(), sum(level.shape[1] for level in kept)), 1)
        chosen = det.pick(torch.cat(kept, 1), index)
        return chosen, (rank >= 0).to(chosen.dtype)
