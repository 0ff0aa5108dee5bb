"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al. 2019, arXiv:1904.01355; 2020, arXiv:2006.09214), on
torchvision's FCOSHead: centre sampling, distances normalised by the stride, GIoU loss, centreness on the box tower.

Keys are those of torchvision's FCOS (head.classification_head..., head.regression_head...); `convert` takes
MMDetection's FCOSHead, whose numbers FCOS(**MMDETECTION, ...) gives, those of the first paper FCOS(**FIRST, ...).
Differs from torchvision: labels are 0..K-1; boxes that clipping leaves empty are dropped (min_size=-1 keeps them); a
distance that lies exactly on the border of two levels belongs to both (there to none); points are matched for
the whole batch at once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import sigmoid_focal_loss

from . import detection as det
from .one_stage import IOU_LOSSES, Candidates, OneStage, Scale, by_location
from .pyramid import FeatureInfo, choose, norm_layer, positive
from .renaming import rename

# What MMDetection's FCOSHead with the tricks of the second paper computes otherwise than torchvision, and without them.
MMDETECTION: dict[str, Any] = {
    'point_offset': 0.5,
    'exact_strides': True,
    'scales': True,
    'weigh_boxes': True,
    'product': True,
    'score_threshold': 0.05,
    'nms_threshold': 0.5,
}
FIRST: dict[str, Any] = {
    **MMDETECTION,
    'center_radius': None,
    'distance': 'exp',
    'centerness': 'classes',
    'conv_bias': False,
    'box_loss': 'iou',
}


class FCOS(OneStage):
    """Anchor-free one-stage detector on maps of one width (an FPN's).

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; labels are 0..K-1.
        channels: width of the towers (default: the maps').
        num_convs: convolutions of each tower.
        norm: 'group' (published) or 'none' in the towers.
        conv_bias: of the towers' convolutions.
        center_radius: points within so many strides of a box's centre are positive; None: all points inside the box.
        size_ranges: per level, [low, high]: the largest distance to a side, in pixels, that the level is responsible
            for; default 4 to 8 strides, from 0 on the first and to infinity on the last level.
        point_offset, exact_strides: placement of the points, see detection.PyramidAnchors.
        box_loss: 'giou' (torchvision), 'iou' (the first paper), 'diou' or 'ciou'.
        box_weight: factor of the box loss.
        distance: 'relu' of strides (torchvision) or 'exp' of pixels (the first paper) are the distances.
        centerness: whose tower gives it, 'boxes' (torchvision) or 'classes' (the first paper).
        scales: a learnable factor of each level's distances.
        weigh_boxes: each point's box loss counts by its centreness.
        product: the score is class score * centreness, and class scores alone choose candidates (the papers);
            torchvision takes the root of the product for both.
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
        norm: str = 'group',
        conv_bias: bool = True,
        center_radius: float | None = 1.5,
        size_ranges: Sequence[tuple[float, float]] | None = None,
        point_offset: float = 0.0,
        exact_strides: bool = False,
        box_loss: str = 'giou',
        box_weight: float = 1.0,
        distance: str = 'relu',
        centerness: str = 'boxes',
        scales: bool = False,
        weigh_boxes: bool = False,
        product: bool = False,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        prior: float = 0.01,
        score_threshold: float = 0.2,
        nms_threshold: float = 0.6,
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
        if center_radius is not None and center_radius <= 0:
            raise ValueError(f'center_radius must be positive or None, got {center_radius}')
        self.center_radius = center_radius
        self.box_loss, self.box_weight = choose('box_loss', box_loss, tuple(IOU_LOSSES)), box_weight
        self.distance = choose('distance', distance, ('relu', 'exp'))
        self.centerness = choose('centerness', centerness, ('boxes', 'classes'))
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma

        strides = self.inputs.reduction()
        if size_ranges is None:
            size_ranges = [
                (0.0 if i == 0 else 4.0 * s, math.inf if i == len(strides) - 1 else 8.0 * s)
                for i, s in enumerate(strides)
            ]
        if len(size_ranges) != len(strides) or any(not 0 <= low < high for low, high in size_ranges):
            raise ValueError(f'size_ranges needs one 0 <= low < high per level ({len(strides)}), got {size_ranges}')
        self.size_ranges = [(float(low), float(high)) for low, high in size_ranges]
        self.anchors = det.PyramidAnchors(
            info=self.inputs,
            sizes=[(s,) for s in strides],
            aspect_ratios=(1.0,),
            offset=point_offset,
            exact_strides=exact_strides,
        )
        width = self.inputs.same_channels('FCOS')
        channels = positive('channels', width if channels is None else channels)
        # Built without towers (they would insist on multiples of 32 channels); ours have the same keys.
        self.head = FCOSHead(channels, 1, num_classes, num_convs=0)
        for part in (self.head.classification_head, self.head.regression_head):
            part.conv = _tower(width, channels, num_convs, norm, conv_bias)
        nn.init.constant_(self.head.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))
        self.scales = nn.ModuleList(Scale() for _ in strides) if scales else None
        self.weigh_boxes, self.product = weigh_boxes, product
        self.box_coder = BoxLinearCoder(normalize_by_size=True)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """List of maps -> class logits (B, N, K), distances in strides (B, N, 4) >= 0, centreness logits (B, N, 1)."""
        self.inputs.check(features)
        logits, distances, centerness = [], [], []
        classes, boxes = self.head.classification_head, self.head.regression_head
        for i, x in enumerate(features):
            by_class, by_box = classes.conv(x), boxes.conv(x)
            logits.append(classes.cls_logits(by_class))
            distance = boxes.bbox_reg(by_box)
            distance = distance if self.scales is None else self.scales[i](distance)
            exponential = self.distance == 'exp'
            distances.append(distance.exp() / self.inputs.reduction()[i] if exponential else F.relu(distance))
            centerness.append(boxes.bbox_ctrness(by_box if self.centerness == 'boxes' else by_class))
        return by_location(logits, self.num_classes), by_location(distances, 4), by_location(centerness, 1)

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_cls', 'loss_box', 'loss_centerness'}: sums over the batch, divided by its positive points."""
        logits, distances, centerness = (x.float() for x in self(features))
        truth = det.gather_targets(targets, self.num_classes, logits.device)
        levels = self.anchors.on(features)
        points = torch.cat(levels)
        matched = self._match(truth, points, det.level_sizes(levels))
        picture, point = (matched >= 0).nonzero(as_tuple=True)
        row = truth.rows(matched)[picture, point]
        count = max(1, len(point))

        wanted = torch.zeros_like(logits)
        wanted[picture, point, truth.labels[row]] = 1
        loss_cls = sigmoid_focal_loss(logits, wanted, self.focal_alpha, self.focal_gamma, reduction='sum')
        boxes = self.box_coder.decode(distances[picture, point], points[point])
        each = IOU_LOSSES[self.box_loss](boxes, truth.boxes[row], reduction='none')
        weight = centre_weight(self.box_coder.encode(points[point], truth.boxes[row]))
        loss_box = (each * weight).sum() / weight.sum().clamp(min=1e-6) if self.weigh_boxes else each.sum() / count
        loss_centerness = F.binary_cross_entropy_with_logits(centerness[picture, point, 0], weight, reduction='sum')
        return {
            'loss_cls': loss_cls / count,
            'loss_box': self.box_weight * loss_box,
            'loss_centerness': loss_centerness / count,
        }

    def _match(self, truth: det.GroundTruth, points: Tensor, lengths: Sequence[int]) -> Tensor:
        """(B, N) int64: the smallest of the picture's boxes that each point may predict, or BACKGROUND."""
        boxes = truth.real[:, None]  # (T, 1, 4)
        centre, size = (points[:, :2] + points[:, 2:]) / 2, points[:, 2] - points[:, 0]
        sides = torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], 2)  # (T, N, 4)
        low, high = (
            torch.tensor(self.size_ranges, device=points.device)
            .repeat_interleave(torch.tensor(lengths, device=points.device), 0)
            .unbind(1)
        )
        farthest = sides.amax(2)
        allowed = (sides.amin(2) > 0) & (farthest >= low) & (farthest <= high)
        if self.center_radius is not None:
            off = (centre - (boxes[..., :2] + boxes[..., 2:]) / 2).abs().amax(2)
            allowed &= off < self.center_radius * size
        area = (boxes[..., 2:] - boxes[..., :2]).prod(2)  # (T, 1)
        smallest, index = det.spread(torch.where(allowed, area, math.inf), truth.counts, math.inf).min(1)
        return torch.where(smallest < math.inf, index, det.BACKGROUND)

    def candidates(self, features: Sequence[Tensor]) -> Candidates:
        logits, distances, centerness = (x.float() for x in self(features))
        scores, centerness = logits.sigmoid(), centerness.sigmoid()
        if self.product:
            return Candidates(scores, centerness[..., 0], distances)
        return Candidates(torch.sqrt(scores * centerness), None, distances)

    def boxes_of(self, offsets: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode(offsets, anchors)


def centre_weight(sides: Tensor) -> Tensor:
    """Centreness of points with positive distances (left, top, right, bottom): 1 in the middle, 0 on the border."""
    horizontal, vertical = sides[..., 0::2], sides[..., 1::2]
    return torch.sqrt(horizontal.amin(-1) / horizontal.amax(-1) * (vertical.amin(-1) / vertical.amax(-1)))


def _tower(in_channels: int, channels: int, num_convs: int, norm: str, bias: bool) -> nn.Sequential:
    """(3x3 convolution, norm, ReLU) in a flat Sequential as torchvision has it, normal std 0.01."""
    layer = norm_layer(choose('norm', norm, ('none', 'group')))
    if num_convs < 1 and in_channels != channels:
        raise ValueError(f"num_convs=0 needs channels equal to the maps' width {in_channels}, got channels={channels}")
    layers: list[nn.Module] = []
    for i in range(num_convs):
        conv = nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1, bias=bias)
        nn.init.normal_(conv.weight, std=0.01)
        if bias:
            nn.init.zeros_(conv.get_parameter('bias'))
        layers += [conv, layer(channels) if layer else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers)


_RENAMES = (
    (r'^bbox_head\.', ''),
    (r'^(cls|reg)_convs\.', r'conv_\1.conv.'),
    (r'^conv_cls\.(?!conv\.)', 'conv_cls.cls_logits.'),
    (r'^conv_reg\.(?!conv\.)', 'conv_reg.bbox_reg.'),
    (r'^conv_centerness\.', 'conv_reg.bbox_ctrness.'),
    (r'^conv_cls\.', 'head.classification_head.'),
    (r'^conv_reg\.', 'head.regression_head.'),
)


def convert(state: dict[str, Any]) -> dict[str, Any]:
    """The head's entries of a state dict under the names of MMDetection's FCOSHead, renamed to torchvision's."""
    renamed = {}
    for key, value in state.items():
        key = rename(key, _RENAMES)
        # torchvision's towers are flat: convolution, norm, ReLU.
        key = re.sub(r'\.conv\.(\d+)\.conv\.', lambda match: f'.conv.{3 * int(match[1])}.', key)
        key = re.sub(r'\.conv\.(\d+)\.gn\.', lambda match: f'.conv.{3 * int(match[1]) + 1}.', key)
        renamed[key] = value
    return renamed
