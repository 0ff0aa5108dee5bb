"""Without this ATSS's positives could be chosen from the wrong anchors and still train: they are compared with a loop
that follows the paper line by line; GFL's distributions with distances known beforehand."""

import pytest
import torch
from small_detectors import INFO, SIZE, maps, target
from torchvision.ops import box_iou

from densezoo.heads import ATSS, GFL, detection
from densezoo.heads.atss import match_by_statistics
from densezoo.heads.gfl import distribution_focal_loss

TARGETS = [target([4, 6, 40, 50], [50, 20, 110, 80], [60, 30, 84, 52]), target(), target([10, 40, 90, 90])]


def by_the_paper(levels, boxes, k):
    """Algorithm 1 of the paper for one picture: object of each anchor or -1."""
    anchors = torch.cat(levels)
    best, owner = torch.full((len(anchors),), -1.0), torch.full((len(anchors),), -1)
    for number, box in enumerate(boxes):
        candidates, start = [], 0
        for level in levels:
            centre = (level[:, :2] + level[:, 2:]) / 2
            distance = (centre - (box[:2] + box[2:]) / 2).square().sum(1)
            candidates += [start + i for i in distance.argsort(stable=True)[:k].tolist()]
            start += len(level)
        overlap = box_iou(box[None], anchors[candidates])[0]
        threshold = overlap.mean() + overlap.std()
        for anchor, value in zip(candidates, overlap):
            x, y = (anchors[anchor, :2] + anchors[anchor, 2:]) / 2
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if value >= threshold and inside and value > best[anchor]:
                best[anchor], owner[anchor] = value, number
    return owner


def test_matching_follows_the_paper():
    head = ATSS(feature_info=INFO, num_classes=5, anchor_scale=4.0)
    levels = head.anchors.on(maps(INFO))
    # odd corners: no two anchors are equally far
    many = torch.rand(40, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([80.0, 60, 45, 35])
    many[:, 2:] += many[:, :2] + 3
    targets = [{**t, 'boxes': t['boxes'] + torch.tensor([0.3, 0.7, 0.9, 0.4])} for t in TARGETS]
    targets.append({'boxes': many, 'labels': torch.arange(40) % 5})
    truth = detection.gather_targets(targets, 5, torch.device('cpu'))
    ours = match_by_statistics(truth, levels, 9)
    for found, t in zip(ours, targets, strict=True):
        assert torch.equal(found, by_the_paper(levels, t['boxes'], 9))
        assert (found >= 0).any() == (len(t['boxes']) > 0)


def test_one_candidate_only():
    """A map of one cell gives one candidate, whose standard deviation is no number."""
    truth = detection.gather_targets([target([0, 0, 30, 30])], 5, torch.device('cpu'))
    level = torch.tensor([[0.0, 0, 28, 28]])
    assert match_by_statistics(truth, [level], 9).tolist() == [[0]]


def test_distributions_of_known_distances():
    """All weight on two neighbours: their mean is the distance, and no other distribution costs less."""
    distance = torch.tensor([0.0, 2.25, 15.9])
    weights = torch.full((3, 17), 1e-9)
    weights[0, 0], weights[1, 2], weights[1, 3], weights[2, 15], weights[2, 16] = 1, 0.75, 0.25, 0.1, 0.9
    least = distribution_focal_loss(weights.log(), distance)
    torch.testing.assert_close(least[0], torch.tensor(0.0), atol=1e-5, rtol=0)
    for noise in (0.3, -0.3):
        other = weights.log().clone()
        other[1, 2] += noise
        assert distribution_focal_loss(other, distance)[1] > least[1]
    head = GFL(feature_info=INFO, num_classes=5)
    anchors = torch.tensor([[32.0, 32, 96, 96]])  # of stride 8, around (64, 64)
    sides = weights[[1, 0, 1, 2]].log().view(1, -1)
    torch.testing.assert_close(
        head.boxes_of(sides, anchors), torch.tensor([[64 - 18.0, 64, 64 + 18, 64 + 15.9 * 8]]), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize('kind', [ATSS, GFL])
def test_perfect_boxes_cost_nothing(kind):
    head = kind(feature_info=INFO, num_classes=5, anchor_scale=4.0)
    truth = detection.gather_targets(TARGETS, 5, torch.device('cpu'))
    anchors = torch.cat(head.anchors.on(maps(INFO)))
    matched, _ = head.match(truth, head.anchors.on(maps(INFO)))
    picture, anchor = (matched >= 0).nonzero(as_tuple=True)
    row = truth.rows(matched)[picture, anchor]
    boxes = truth.boxes[row]
    logits = torch.full((*matched.shape, 5), -20.0)
    logits[picture, anchor, truth.labels[row]] = 20.0
    if kind is ATSS:
        values = torch.zeros(*matched.shape, 4)
        values[picture, anchor] = head.box_coder.encode_single(boxes, anchors[anchor])
        head.forward = lambda features: (logits, values, torch.full((*matched.shape, 1), 10.0))
    else:
        stride = (anchors[anchor, 2:3] - anchors[anchor, :1]) / 4.0
        centre = (anchors[anchor, :2] + anchors[anchor, 2:]) / 2
        distance = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], 1) / stride
        steps = torch.arange(17.0)
        weights = (1 - (distance[..., None] - steps).abs()).clamp(min=1e-9)
        values = torch.zeros(*matched.shape, 68)
        values[picture, anchor] = weights.log().flatten(1)
        head.forward = lambda features: (logits, values)
    losses = head.loss(maps(INFO), TARGETS)
    assert losses['loss_box'] < 1e-3 and losses['loss_cls'] < 1e-3, losses
    results = head.eval().predict(maps(INFO), [SIZE] * 3)
    for t, result in zip(TARGETS, results, strict=True):
        sure = result['scores'] > 0.5
        assert sure.sum() == len(t['boxes'])
        for box, label in zip(t['boxes'], t['labels']):
            near = (result['boxes'][sure] - box).abs().amax(1).argmin()
            torch.testing.assert_close(result['boxes'][sure][near], box, rtol=1e-3, atol=0.05)
            assert result['labels'][sure][near] == label
