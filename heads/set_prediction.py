"""What detectors that predict a set share (DETR, Carion et al. 2020, arXiv:2005.12872): one-to-one matching, losses of
matched pairs, and decoding without suppression.

Predicted boxes are (centre x, centre y, width, height) as fractions of a frame: the valid part of each picture, or the
padded batch. All layers of a decoder are matched and scored together: one copy to the host, no loop over pictures but
scipy's.

L layers, B pictures, Q queries, K classes, M objects of the fullest picture.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from . import detection as det
from .hungarian import hungarian
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, choose, positive

CLASS_LOSSES = ('softmax', 'focal', 'varifocal')


class Objects(NamedTuple):
    """boxes (B, M, 4) as fractions, labels (B, M) int64, counts of each picture, total: of a rank, at least 1."""

    boxes: Tensor
    labels: Tensor
    counts: list[int]
    total: Tensor


class SetDetector(nn.Module):
    """A detector whose `layers(features, sizes)` gives logits (L, B, Q, K or K + 1) and boxes (L, B, Q, 4).

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; labels are 0..K-1.
        class_loss: 'softmax' over K + 1 logits, the last one "no object"; 'focal' or 'varifocal' on K sigmoids.
        class_weight, box_weight, giou_weight: of the three losses.
        class_cost, box_cost, giou_cost: of the three terms that matching weighs.
        no_object: weight of "no object" in 'softmax'.
        detections: results of a picture.
        score_threshold: results have more.
        min_size: results have sides longer than that; -1 keeps all.
    """

    end_to_end = True  # decode() gives results: there is nothing to suppress

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        class_loss: str,
        class_weight: float,
        box_weight: float,
        giou_weight: float,
        class_cost: float,
        box_cost: float,
        giou_cost: float,
        no_object: float,
        detections: int,
        score_threshold: float,
        min_size: float,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        self.class_loss = choose('class_loss', class_loss, CLASS_LOSSES)
        self.weights = {'loss_cls': class_weight, 'loss_box': box_weight, 'loss_giou': giou_weight}
        self.costs = (class_cost, box_cost, giou_cost)
        self.no_object = no_object
        det.check_thresholds(score_threshold=score_threshold)
        self.detections = positive('detections', detections)
        self.score_threshold, self.min_size = score_threshold, min_size

    def layers(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def last_layer(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, K or K + 1) and boxes (B, Q, 4) of the last layer alone."""
        logits, boxes = self.layers(features, sizes)
        return logits[-1], boxes[-1]

    def frames(self, sizes: Sequence[Size], padded: Size) -> Sequence[Size]:
        """(height, width) that the fractions of each picture refer to: its valid part."""
        return sizes

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> logits and boxes of every layer; the whole padded batch counts as valid."""
        return self.layers(features, None)

    def objects(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> tuple[Objects, list[Size]]:
        """Checked targets, and the valid size of each picture."""
        padded = self.inputs.padded_size(features)
        sizes = [det.pair(target.get('size', padded)) for target in targets]
        truth = gather_objects(targets, self.frames(sizes, padded), self.num_classes, features[0].device)
        return truth, sizes

    def match(self, logits: Tensor, boxes: Tensor, truth: Objects, times: int = 1) -> Tensor:
        """(..., B, Q) int64: the object of each query, -1 for none; each object has up to `times` queries."""
        often = repeated(truth, times) if times > 1 else truth
        costs = matching_costs(logits, boxes, often, softmax=self.class_loss == 'softmax', weights=self.costs)
        matched = hungarian(costs, often.counts)
        if times == 1:
            return matched
        objects = torch.tensor(truth.counts, device=matched.device).clamp(min=1)[:, None]
        return torch.where(matched >= 0, matched % objects, matched)

    def losses(self, logits: Tensor, boxes: Tensor, truth: Objects, matched: Tensor) -> dict[str, Tensor]:
        """{'loss_cls', 'loss_box', 'loss_giou'}: weighted, (L,) each."""
        terms = set_losses(
            logits, boxes, truth, matched, class_loss=self.class_loss, no_object=self.no_object, total=truth.total
        )
        return {name: value * self.weights[name] for name, value in terms.items()}

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_cls', 'loss_box', 'loss_giou'} of the last layer, and with '_0', '_1' ... those of the others."""
        truth, sizes = self.objects(features, targets)
        logits, boxes = (x.float() for x in self.layers(features, sizes))
        return by_layer(self.losses(logits, boxes, truth, self.match(logits, boxes, truth)))

    def best(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one layer (B, Q, ...): boxes (B, D, 4) as fractions, scores (B, D), labels (B, D); best first."""
        if self.class_loss == 'softmax':
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, index = scores.topk(min(self.detections, scores.shape[1]), 1)
            return det.pick(boxes, index), scores, labels.gather(1, index)
        scores, index = logits.sigmoid().flatten(1).topk(min(self.detections, logits[0].numel()), 1)
        query = torch.div(index, self.num_classes, rounding_mode='floor')
        return det.pick(boxes, query), scores, index % self.num_classes

    def decode(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Results of fixed number D, for exported graphs: boxes (B, D, 4) xyxy in pixels of the padded batch, clipped
        to it, scores (B, D), labels (B, D) int64; best first, rows that hold nothing have the score 0."""
        boxes, scores, labels = self.best(*(x.float() for x in self.last_layer(features, None)))
        height, width = self.inputs.padded_size(features)
        boxes = box_convert(boxes, 'cxcywh', 'xyxy').clamp(0, 1)
        boxes = torch.stack([boxes[..., i] * (height if i % 2 else width) for i in range(4)], -1)
        return boxes, torch.where(scores > self.score_threshold, scores, 0.0), labels

    def predict(
        self, features: Sequence[Tensor], sizes: Sequence[Size], original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """One {'boxes' (n, 4) xyxy, 'scores' (n,), 'labels' (n,)} per picture, best first, inside its valid size."""
        padded = self.inputs.padded_size(features)
        check_sizes(sizes, features[0].shape[0], padded, original_sizes)
        sizes = [det.pair(size) for size in sizes]
        best = self.best(*(x.float() for x in self.last_layer(features, sizes)))
        results = []
        for i, (size, (height, width)) in enumerate(zip(sizes, self.frames(sizes, padded))):
            boxes, scores, labels = (x[i] for x in best)
            boxes = box_convert(boxes, 'cxcywh', 'xyxy') * boxes.new_tensor([width, height, width, height])
            boxes = clip_boxes_to_image(boxes, size)
            keep = ((boxes[:, 2:] - boxes[:, :2]) > self.min_size).all(1) & (scores >= self.score_threshold)
            boxes = det.rescale(boxes[keep], size, original_sizes[i] if original_sizes else None)
            results.append({'boxes': boxes, 'scores': scores[keep], 'labels': labels[keep]})
        return results


def gather_objects(
    targets: Sequence[Mapping[str, Any]], frames: Sequence[Size], num_classes: int, device: torch.device
) -> Objects:
    """Padded boxes and labels of a batch. Boxes without area are left out: nothing could overlap them."""
    truth = det.gather_targets(targets, num_classes, device)
    boxes, labels, counts = truth.real, truth.labels[:-1], truth.counts
    large = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not large.all():
        boxes, labels = boxes[large], labels[large]
        counts = [int(picture.sum()) for picture in large.cpu().split(counts)]
    scale = torch.tensor([[w, h, w, h] for h, w in frames], device=device, dtype=torch.float32)
    boxes = det.spread(boxes, counts, 0.0) / scale[:, None]
    labels = det.spread(labels[:, None], counts, 0)[..., 0]
    return Objects(box_convert(boxes, 'xyxy', 'cxcywh'), labels, counts, mean_total(sum(counts), device))


def repeated(truth: Objects, times: int) -> Objects:
    """Every object `times` times: column j of a picture with n objects is its object j modulo n."""
    counts = torch.tensor(truth.counts, device=truth.labels.device).clamp(min=1)[:, None]
    index = torch.arange(truth.labels.shape[1] * times, device=counts.device) % counts
    return Objects(
        det.pick(truth.boxes, index),
        truth.labels.gather(1, index),
        [count * times for count in truth.counts],
        truth.total * times,
    )


def mean_total(count: int, device: torch.device) -> Tensor:
    """Objects per rank (at least 1), the mean over all ranks: gradients are averaged over them too."""
    total = torch.tensor(float(count), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)


@torch.no_grad()
def matching_costs(
    logits: Tensor, boxes: Tensor, truth: Objects, *, softmax: bool, weights: tuple[float, float, float]
) -> Tensor:
    """(..., B, Q, M) of queries and objects: class, L1 of the four fractions, and GIoU.

    The class term is the object's probability, negated (softmax), or the difference of the focal loss (alpha 0.25,
    gamma 2) as positive and as negative.
    """
    wanted = truth.labels[:, None].expand(*logits.shape[:-1], -1)
    if softmax:
        by_class = -logits.softmax(-1).gather(-1, wanted)
    else:
        score = logits.sigmoid()
        as_positive = -0.25 * (1 - score) ** 2 * (score + 1e-8).log()
        as_negative = -0.75 * score**2 * (1 - score + 1e-8).log()
        by_class = (as_positive - as_negative).gather(-1, wanted)
    distance = (boxes[..., :, None, :] - truth.boxes[:, None]).abs().sum(-1)
    overlap = pairwise_giou(box_convert(boxes, 'cxcywh', 'xyxy'), box_convert(truth.boxes, 'cxcywh', 'xyxy'))
    return weights[0] * by_class + weights[1] * distance - weights[2] * overlap


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """(..., Q, 4), (..., M, 4) xyxy -> generalised IoU (..., Q, M): torchvision's, with leading dimensions."""
    a, b = boxes[..., :, None, :], others[..., None, :, :]
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / union.clamp(min=1e-9) - (outer - union) / outer.clamp(min=1e-9)


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    truth: Objects,
    matched: Tensor,
    *,
    class_loss: str,
    no_object: float,
    total: Tensor,
) -> dict[str, Tensor]:
    """The losses of each layer, not weighted: {'loss_cls', 'loss_box', 'loss_giou'}, (L,).

    Args:
        logits: (L, B, Q, K), or K + 1 with 'softmax'; float32.
        boxes: (L, B, Q, 4).
        truth: the objects.
        matched: (L, B, Q) int64, the object of each query or negative.
        class_loss: see SetDetector.
        no_object: weight of queries without an object in 'softmax'.
        total: what sums are divided by.
    """
    layers = len(logits)
    layer, picture, query = (matched >= 0).nonzero(as_tuple=True)
    chosen = matched[layer, picture, query]
    ours, wanted, labels = boxes[layer, picture, query], truth.boxes[picture, chosen], truth.labels[picture, chosen]

    def sum_by_layer(values: Tensor) -> Tensor:
        return values.new_zeros(layers).index_add(0, layer, values)

    corners = box_convert(ours, 'cxcywh', 'xyxy'), box_convert(wanted, 'cxcywh', 'xyxy')
    loss_box = sum_by_layer((ours - wanted).abs().sum(1)) / total
    loss_giou = sum_by_layer(generalized_box_iou_loss(*corners, reduction='none')) / total

    if class_loss == 'softmax':
        classes = torch.full_like(matched, logits.shape[-1] - 1)
        classes[layer, picture, query] = labels
        each = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction='none').view(layers, -1)
        weight = torch.where(matched.flatten(1) >= 0, 1.0, no_object)
        loss_cls = (each * weight).sum(1) / weight.sum(1)
    else:
        hot = torch.zeros_like(logits)
        if class_loss == 'focal':
            hot[layer, picture, query, labels] = 1
            each = sigmoid_focal_loss(logits, hot, 0.25, 2.0, reduction='none')
        else:
            overlap = det.paired_iou(*(x.detach() for x in corners))
            positive = hot.bool()
            positive[layer, picture, query, labels] = True
            hot[layer, picture, query, labels] = overlap.to(hot.dtype)
            each = varifocal_loss(logits, hot, positive)
        loss_cls = each.flatten(1).sum(1) / total
    return {'loss_cls': loss_cls, 'loss_box': loss_box, 'loss_giou': loss_giou}


def varifocal_loss(
    logits: Tensor, quality: Tensor, positive: Tensor, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """VarifocalNet (Zhang et al. 2020, arXiv:2008.13367): cross entropy with a positive's IoU, elementwise.

    Negatives (quality 0) weigh alpha * score^gamma, positives their quality: one that overlaps nothing counts for
    nothing, as in RT-DETR (in VarifocalNet it is a negative).
    """
    weight = torch.where(positive, quality, alpha * logits.detach().sigmoid() ** gamma)
    return weight * F.binary_cross_entropy_with_logits(logits, quality, reduction='none')


def by_layer(losses: Mapping[str, Tensor], suffix: str = '') -> dict[str, Tensor]:
    """{'loss_cls': (L,)} -> {'loss_cls' (last), 'loss_cls_0', ...}."""
    named = {}
    for name, values in losses.items():
        for i, value in enumerate(values):
            named[f'{name}{suffix}' + ('' if i == len(values) - 1 else f'_{i}')] = value
    return named


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)), both at least eps."""
    x = x.clamp(0, 1)
    return x.clamp(min=eps).log() - (1 - x).clamp(min=eps).log()
