"""ATSS: Bridging the Gap Between Anchor-based and Anchor-free Detection (Zhang et al. 2019, arXiv:1912.02424).

One square anchor per location; which of them are positive follows from each box's own statistics. Loss: focal, GIoU
weighted by centreness, cross entropy of centreness. Written from the paper; numbers are those of MMDetection's ATSSHead
(Apache-2.0), whose names `convert` takes. Labels are 0..K-1.
Differs: boxes that clipping leaves empty are dropped (min_size=-1 keeps them).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, sigmoid_focal_loss

from . import detection as det
from .fcos import centre_weight
from .one_stage import IOU_LOSSES, Candidates, OneStage, Scale, by_location, tower
from .pyramid import FeatureInfo, choose, positive
from .renaming import rename

# B pictures, K classes, N anchors of all levels, T boxes of the batch


class SquareAnchors(OneStage):
    """What ATSS and GFL share: one anchor per location, two towers, a factor per level, ATSS's matching.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; labels are 0..K-1.
        outputs: values of each anchor that the box branch gives.
        channels: width of the towers (default: the maps').
        num_convs: convolutions of each tower.
        norm: 'group' (published) or 'none' in the towers.
        anchor_scale: anchors of a level are anchor_scale * stride pixels large.
        anchor_offset: position of an anchor's centre within its cell.
        num_candidates: nearest anchors of each level that a box considers.
        prior: initial score of every class.
        score_threshold, nms_threshold, topk, detections, min_size: decoding, see OneStage.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        outputs: int,
        channels: int | None,
        num_convs: int,
        norm: str,
        anchor_scale: float,
        anchor_offset: float,
        num_candidates: int,
        prior: float,
        score_threshold: float,
        nms_threshold: float,
        topk: int,
        detections: int,
        min_size: float,
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
        strides = self.inputs.reduction()
        self.num_candidates = positive('num_candidates', num_candidates)
        self.anchors = det.PyramidAnchors(
            info=self.inputs,
            sizes=[(anchor_scale * stride,) for stride in strides],
            aspect_ratios=(1.0,),
            offset=anchor_offset,
            exact_strides=True,
            exact_sizes=True,
        )
        width = self.inputs.same_channels(type(self).__name__)
        channels = positive('channels', width if channels is None else channels)
        self.cls_convs = tower(width, channels, num_convs, norm)
        self.reg_convs = tower(width, channels, num_convs, norm)
        self.cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.reg = nn.Conv2d(channels, outputs, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        for conv in (self.cls, self.reg):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.get_parameter('bias'))
        nn.init.constant_(self.cls.get_parameter('bias'), -math.log((1 - prior) / prior))

    def towers(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """List of maps -> logits (B, N, K), box values (B, N, outputs), and the box tower's maps."""
        self.inputs.check(features)
        logits = [self.cls(self.cls_convs(x)) for x in features]
        towers = [self.reg_convs(x) for x in features]
        values = [scale(self.reg(x)) for scale, x in zip(self.scales, towers)]
        return by_location(logits, self.num_classes), by_location(values, self.reg.out_channels), towers

    def match(self, truth: det.GroundTruth, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, N) int64, a box of the picture or BACKGROUND; and what sums are divided by: positives of the batch, a
        picture without any counting as one."""
        matched = match_by_statistics(truth, levels, self.num_candidates)
        return matched, (matched >= 0).sum(1).clamp(min=1).sum()


def match_by_statistics(truth: det.GroundTruth, levels: Sequence[Tensor], num_candidates: int) -> Tensor:
    """ATSS's matching of a whole batch: (B, N) int64, a box of the picture or BACKGROUND.

    A box considers the `num_candidates` anchors of each level whose centres are nearest to its own. Of these it gets
    those inside it whose IoU with it is at least mean + standard deviation of all its candidates' IoUs. An anchor that
    several boxes get goes to the one that it overlaps most.
    """
    anchors, boxes = torch.cat(list(levels)), truth.real
    overlap = box_iou(boxes, anchors)  # (T, N)
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    distance = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, centre, compute_mode='donot_use_mm_for_euclid_dist')
    chosen, start = [], 0
    for level in levels:
        stop = start + len(level)
        near = distance[:, start:stop].topk(min(num_candidates, len(level)), 1, largest=False).indices
        chosen.append(near + start)
        start = stop
    index = torch.cat(chosen, 1)  # (T, candidates)
    considered = overlap.gather(1, index)
    spread = considered.std(1, correction=1 if considered.shape[1] > 1 else 0)
    enough = considered >= (considered.mean(1) + spread)[:, None]
    sides = torch.cat([centre[index] - boxes[:, None, :2], boxes[:, None, 2:] - centre[index]], 2)
    inside = sides.amin(2) > 0.01
    quality = torch.full_like(overlap, -1.0).scatter(1, index, torch.where(enough & inside, considered, -1.0))
    best, box = det.spread(quality, truth.counts, -1.0).max(1)
    return torch.where(best >= 0, box, det.BACKGROUND)


class ATSS(SquareAnchors):
    """One-stage detector with adaptive training sample selection on maps of one width (an FPN's).

    Args:
        feature_info ... num_candidates, prior, score_threshold ... min_size: see SquareAnchors.
        box_loss: 'giou' (published), 'iou', 'diou' or 'ciou'.
        box_weight: factor of the box loss.
        focal_alpha, focal_gamma: of the focal loss.
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
        box_loss: str = 'giou',
        box_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
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
            outputs=4,
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
        self.box_loss, self.box_weight = choose('box_loss', box_loss, tuple(IOU_LOSSES)), box_weight
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.centerness = nn.Conv2d(self.reg.in_channels, 1, 3, padding=1)
        nn.init.normal_(self.centerness.weight, std=0.01)
        nn.init.zeros_(self.centerness.get_parameter('bias'))
        self.box_coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """List of maps -> class logits (B, N, K), box offsets (B, N, 4), centreness logits (B, N, 1)."""
        logits, offsets, towers = self.towers(features)
        return logits, offsets, by_location([self.centerness(x) for x in towers], 1)

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_cls', 'loss_box', 'loss_centerness'}."""
        logits, offsets, centerness = (x.float() for x in self(features))
        truth = det.gather_targets(targets, self.num_classes, logits.device)
        levels = self.anchors.on(features)
        anchors = torch.cat(levels)
        matched, total = self.match(truth, levels)
        picture, anchor = (matched >= 0).nonzero(as_tuple=True)
        row = truth.rows(matched)[picture, anchor]
        boxes, wanted = truth.boxes[row], torch.zeros_like(logits)
        wanted[picture, anchor, truth.labels[row]] = 1
        loss_cls = sigmoid_focal_loss(logits, wanted, self.focal_alpha, self.focal_gamma, reduction='sum')

        chosen = anchors[anchor]
        centre = (chosen[:, :2] + chosen[:, 2:]) / 2
        weight = centre_weight(torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], 1))
        each = IOU_LOSSES[self.box_loss](
            self.box_coder.decode_single(offsets[picture, anchor], chosen), boxes, reduction='none'
        )
        loss_centerness = F.binary_cross_entropy_with_logits(centerness[picture, anchor, 0], weight, reduction='sum')
        return {
            'loss_cls': loss_cls / total,
            'loss_box': self.box_weight * (each * weight).sum() / weight.sum().clamp(min=1),
            'loss_centerness': loss_centerness / total,
        }

    def candidates(self, features: Sequence[Tensor]) -> Candidates:
        logits, offsets, centerness = (x.float() for x in self(features))
        return Candidates(logits.sigmoid(), centerness[..., 0].sigmoid(), offsets)

    def boxes_of(self, offsets: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode_single(offsets, anchors)


_RENAMES = (
    (r'^bbox_head\.', ''),
    (r'^(cls|reg)_convs\.(\d+)\.conv\.', r'\1_convs.\2.0.'),
    (r'^(cls|reg)_convs\.(\d+)\.gn\.', r'\1_convs.\2.1.'),
    (r'^(atss|gfl)_(cls|reg|centerness)\.', r'\2.'),
)


def convert(state: dict[str, Any]) -> dict[str, Any]:
    """The head's entries under the names of MMDetection's ATSSHead or GFLHead, renamed to ours."""
    renamed = {}
    for key, value in state.items():
        key = rename(key, _RENAMES)
        if key != 'integral.project':  # the numbers 0 to reg_max, which we compute
            renamed[key] = value
    return renamed
