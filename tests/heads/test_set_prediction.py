"""Without this set prediction could match another picture's objects, punish perfect predictions, or break on batches
that a data set does contain: no objects, objects of one pixel, more objects than queries."""

import pytest
import torch
from small_detectors import INFO, SIZE, backward, build, maps, target
from torchvision.ops import box_convert, generalized_box_iou

from densezoo.deploy import fuse_for_deploy
from densezoo.heads import DETR, RTDETR, HybridEncoder, PyramidInfo
from densezoo.heads.denoising import denoising_queries
from densezoo.heads.set_prediction import (
    Objects,
    gather_objects,
    matching_costs,
    pairwise_giou,
    repeated,
    set_losses,
    varifocal_loss,
)

SETS = ['detr', 'deformable_detr', 'deformable_detr_two_stages', 'rtdetr']
TARGETS = [target([4, 6, 40, 50], [50, 20, 110, 80], [60, 30, 84, 52]), target(), target([10, 40, 90, 90])]


def boxes_like(*shape, seed=0):
    return torch.rand(*shape, 4, generator=torch.Generator().manual_seed(seed)) * 0.4 + 0.1


def truth():
    return gather_objects(TARGETS, [SIZE] * 3, 5, torch.device('cpu'))


def test_objects_are_fractions_and_flat_boxes_are_left_out():
    flat = [target([10, 10, 10, 40], [4, 6, 40, 50]), target([20, 30, 50, 30]), target([0, 0, 128, 96])]
    found = gather_objects(flat, [SIZE] * 3, 5, torch.device('cpu'))
    assert found.counts == [1, 0, 1] and found.total == 2 and found.labels[:, 0].tolist() == [1, 0, 0]
    torch.testing.assert_close(found.boxes[2, 0], torch.tensor([0.5, 0.5, 1, 1]))
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([22 / 128, 28 / 96, 36 / 128, 44 / 96]))


def test_overlaps_equal_torchvision_s():
    a, b = (box_convert(boxes_like(2, n, seed=n), 'cxcywh', 'xyxy') for n in (7, 4))
    ours = pairwise_giou(a, b)
    for i in range(2):
        torch.testing.assert_close(ours[i], generalized_box_iou(a[i], b[i]))


@pytest.mark.parametrize('softmax', [True, False])
def test_costs_of_a_pair_by_hand(softmax):
    found = truth()
    logits, boxes = torch.randn(2, 3, 6, 6 if softmax else 5), boxes_like(2, 3, 6)
    costs = matching_costs(logits, boxes, found, softmax=softmax, weights=(2.0, 5.0, 3.0))
    layer, picture, query, column = 1, 0, 4, 2
    label, box = found.labels[picture, column], boxes[layer, picture, query]
    p = (logits.softmax(-1) if softmax else logits.sigmoid())[layer, picture, query, label]
    by_class = -p if softmax else 0.75 * p**2 * (1 - p).log() - 0.25 * (1 - p) ** 2 * p.log()
    distance = (box - found.boxes[picture, column]).abs().sum()
    corners = (box_convert(x[None], 'cxcywh', 'xyxy') for x in (box, found.boxes[picture, column]))
    expected = 2 * by_class + 5 * distance - 3 * generalized_box_iou(*corners)[0, 0]
    torch.testing.assert_close(costs[layer, picture, query, column], expected)


@pytest.mark.parametrize('class_loss', ['softmax', 'focal', 'varifocal'])
def test_perfect_predictions_cost_nothing(class_loss):
    found, queries = truth(), 6
    classes = 6 if class_loss == 'softmax' else 5
    logits, boxes = torch.full((1, 3, queries, classes), -30.0), boxes_like(1, 3, queries)
    matched = torch.full((1, 3, queries), -1)
    if class_loss == 'softmax':
        logits[..., -1] = 30.0
    for picture, count in enumerate(found.counts):
        for column in range(count):
            query = 5 - column
            matched[0, picture, query] = column
            boxes[0, picture, query] = found.boxes[picture, column]
            logits[0, picture, query] = -30.0
            logits[0, picture, query, found.labels[picture, column]] = 30.0
    options = {'class_loss': class_loss, 'no_object': 0.1, 'total': found.total}
    losses = set_losses(logits, boxes, found, matched, **options)
    assert all(value.shape == (1,) and value.abs() < 1e-4 for value in losses.values()), losses
    wrong = set_losses(logits, boxes + 0.1, found, matched.flip(2), **options)
    assert all(value > 0.1 for value in wrong.values())


def test_varifocal_loss_ranks_by_overlap():
    """A positive's least loss is where its score is its IoU; negatives that score low hardly count."""
    quality = torch.full((99,), 0.7)
    scores = torch.arange(1, 100) / 100
    assert scores[varifocal_loss(torch.logit(scores), quality, quality > 0).argmin()] == pytest.approx(0.7)
    logits, nothing = torch.logit(torch.tensor([0.05, 0.9])), torch.zeros(2)
    low, high = varifocal_loss(logits, nothing, nothing > 0)
    assert high > 1000 * low
    assert not varifocal_loss(logits, nothing, nothing == 0).any()  # matched, but beside its object


ODD = {
    'one_pixel': [target([10, 10, 11, 11]), target([127, 95, 128, 96], [0, 0, 1, 1]), target()],
    'more_than_queries': [target(*[[i, i, i + 9, i + 11] for i in range(30)]), target([4, 6, 40, 50]), target()],
    'one_class': [{**t, 'labels': torch.zeros_like(t['labels'])} for t in TARGETS],
}


@pytest.mark.parametrize('targets', [pytest.param(t, id=i) for i, t in ODD.items()])
@pytest.mark.parametrize('name', SETS)
def test_odd_targets(name, targets):
    head = build(name)
    losses = backward(head, head.loss(maps(INFO), targets))
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    assert losses['loss_box'] > 0 and losses['loss_giou'] > 0
    with torch.no_grad():
        results = head.eval().predict(maps(INFO), [SIZE] * 3)
    assert all(torch.isfinite(result['boxes']).all() for result in results)


@torch.no_grad()
def test_padding_does_not_count():
    """DETR on a padded picture gives what it gives on the picture alone, whatever stands in the padding."""
    head = DETR(feature_info=PyramidInfo([8], [16]), num_classes=3, channels=16, num_heads=2, hidden=16,
                encoder_layers=2, decoder_layers=1, num_queries=5).eval()  # fmt: skip
    whole = torch.randn(2, 8, 6, 8)
    alone = head.layers([whole[:1, :, :4, :5]], None)
    padded = head.layers([whole], [(60, 80), (96, 128)])
    for ours, expected in zip(padded, alone, strict=True):
        torch.testing.assert_close(ours[:, :1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(head.layers([whole], None)[0][:, :1], alone[0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('name', SETS)
def test_decoded_are_the_predictions(name):
    head = build(name, detections=15).eval()
    boxes, scores, labels = head.decode(maps(INFO))
    assert boxes.shape == (3, 15, 4) and (scores.diff(dim=1) <= 0).all()
    for i, result in enumerate(head.predict(maps(INFO), [SIZE] * 3)):
        count = len(result['scores'])
        assert count > 0
        large = ((boxes[i, :, 2:] - boxes[i, :, :2]) > 0).all(1)
        torch.testing.assert_close(boxes[i][large], result['boxes'], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(scores[i][large], result['scores'])
        assert torch.equal(labels[i][large], result['labels'])
    head.score_threshold = scores[0, 4].item()
    assert (head.decode(maps(INFO))[1][0, 4:] == 0).all()


# Denoising, RT-DETR ----------------------------------------------------------------------------------


def test_denoising_queries():
    found = truth()
    noisy = denoising_queries(found, 5, queries=7, label_noise=0.0, box_noise=0.4)
    assert noisy.groups == 2 and noisy.labels.shape == (3, 12)  # 7 // 3 groups of 3 positives and 3 near misses
    assert noisy.matched[0].tolist() == [0, 1, 2, -1, -1, -1] * 2
    assert (noisy.matched[1] == -1).all() and noisy.matched[2].tolist() == [0, -1, -1, -1, -1, -1] * 2
    assert noisy.labels[0].tolist() == [0, 1, 2] * 4 and (noisy.labels[1] == 5).all()
    assert (noisy.boxes[1] == 0).all()
    corners = box_convert(noisy.boxes[0], 'cxcywh', 'xyxy')
    wanted = box_convert(found.boxes[0], 'cxcywh', 'xyxy').repeat(4, 1)
    half = found.boxes[0, :, 2:].repeat(4, 2) / 2
    moved = (corners - wanted).abs() / half / 0.4
    near_miss = torch.tensor([False] * 3 + [True] * 3).repeat(2)
    assert (moved[~near_miss] <= 1 + 1e-4).all() and moved[~near_miss].max() > 0.3
    unclipped = (corners > 0) & (corners < 1)
    assert (moved[near_miss][unclipped[near_miss]] >= 1 - 1e-4).all() and (moved <= 2 + 1e-4).all()
    apart = noisy.apart(2)
    block = torch.ones(6, 6, dtype=torch.bool)
    expected = torch.cat([torch.block_diag(block, block), torch.zeros(2, 12, dtype=torch.bool)])
    assert torch.equal(~apart, torch.cat([expected, torch.ones(14, 2, dtype=torch.bool)], 1))
    none = gather_objects([target()], [SIZE], 5, torch.device('cpu'))
    assert denoising_queries(none, 5, queries=7, label_noise=0.5, box_noise=1.0) is None
    drawn = denoising_queries(found, 5, queries=3000, label_noise=1.0, box_noise=1.0)
    assert 0.3 < (drawn.labels[0] != torch.tensor([0, 1, 2]).repeat(2 * drawn.groups)).float().mean() < 0.5


def test_denoising_does_not_change_what_ordinary_queries_see():
    head, features = build('rtdetr').eval(), maps(INFO)
    cells, shapes = head.encode(features)
    query, _, start = head.select(cells, shapes)
    noisy = denoising_queries(truth(), 5, queries=7, label_noise=0.5, box_noise=1.0)
    more = torch.cat([head.denoising_class_embed(noisy.labels), query], 1)
    boxes = torch.cat([torch.randn(3, 12, 4), start], 1)
    alone = head.decode_queries(query, start, cells, shapes, every=True)
    together = head.decode_queries(more, boxes, cells, shapes, every=True, apart=noisy.apart(query.shape[1]))
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours[:, :, 12:], expected, rtol=1e-4, atol=1e-5)


def test_objects_repeated_for_the_encoder():
    found = Objects(boxes_like(2, 3), torch.tensor([[1, 2, 3], [4, 0, 0]]), [3, 1], torch.tensor(4.0))
    often = repeated(found, 2)
    assert often.labels[0].tolist() == [1, 2, 3] * 2 and often.labels[1, :2].tolist() == [4, 4]
    assert often.counts == [6, 2] and torch.equal(often.boxes[0, 3:], found.boxes[0])
    head = build('rtdetr')
    # Queries 0, 1, 2 ... lie on objects 0, 1, 2, 0, 1, 2 of the first picture, and on the only one of the second.
    boxes = torch.stack([torch.cat([found.boxes[0]] * 3), found.boxes[1, :1].expand(9, -1)])
    matched = head.match(torch.zeros(2, 9, 5), boxes, found, 2)
    for picture, count in enumerate(found.counts):
        chosen = matched[picture][matched[picture] >= 0]
        assert chosen.bincount(minlength=count).tolist() == [2] * count
    assert all(number in (-1, query % 3) for query, number in enumerate(matched[0].tolist()))
    head = build('rtdetr', encoder_matches=3, num_denoising=0)
    losses = backward(head, head.loss(maps(INFO), TARGETS))
    once = build('rtdetr', num_denoising=0).loss(maps(INFO), TARGETS)
    assert losses['loss_cls'] == pytest.approx(once['loss_cls'].item())
    assert losses['loss_box_encoder'] > once['loss_box_encoder'].item()  # worse cells, the same divisor for each


@torch.no_grad()
def test_two_stages_without_refinement_move_the_proposals():
    head, features = build('deformable_detr_two_stages', refine=False).eval(), maps(INFO)
    assert len(head.class_embed) == len(head.bbox_embed) == 1
    _, _, proposals, _ = head._start(head.encode(features, None))
    moved = head.layers(features, None)[1]
    assert (moved - proposals).abs().amax((1, 2, 3)).min() > 0.01
    for parameter in head.bbox_embed[0].layers[-1].parameters():
        parameter.zero_()
    _, _, proposals, _ = head._start(head.encode(features, None))
    torch.testing.assert_close(head.layers(features, None)[1], proposals.expand(2, -1, -1, -1))


@torch.no_grad()
def test_fewer_layers_in_inference():
    head, features = build('rtdetr').eval(), maps(INFO)  # eval_layers=1 of 2
    logits, boxes = head.layers(features, None)
    first = head.last_layer(features, None)
    torch.testing.assert_close(first[0], logits[0])
    torch.testing.assert_close(first[1], boxes[0])
    head.eval_layers = 2
    torch.testing.assert_close(head.last_layer(features, None)[0], logits[1])


@torch.no_grad()
def test_hybrid_encoder_fuses_to_fewer_operations():
    info = PyramidInfo([8, 12, 20], [4, 8, 16])
    neck = HybridEncoder(feature_info=info, out_channels=16, hidden=16, depth=1)
    for _ in range(2):  # statistics other than 0 and 1
        neck.train()(maps(info))
    features = maps(info, (70, 90))
    fused = fuse_for_deploy(neck.eval())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in neck.modules()) > 15
    for ours, expected, x in zip(fused(features), neck(features), features, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert ours.shape == (3, 16, *x.shape[-2:])
    assert neck.feature_info.channels() == [16] * 3 and neck.feature_info.reduction() == [4, 8, 16]


ERRORS = [
    (lambda: build('rtdetr', num_queries=4000), r'num_queries must be in 1\.\.3840, got 4000'),
    (lambda: build('rtdetr', eval_layers=3), r'eval_layers must be in 1\.\.2 or None, got 3'),
    (lambda: build('detr', num_heads=3), 'channels must be a multiple of 4 and of num_heads=3, got 16'),
    (lambda: build('deformable_detr', num_levels=2), 'num_levels must be at least the 3 maps of the pyramid, got 2'),
    (lambda: RTDETR(feature_info=INFO, num_classes=3, label_noise=1.5), r'label_noise must be in \[0, 1\], got 1.5'),
]


@pytest.mark.parametrize(('call', 'message'), [pytest.param(c, m, id=str(i)) for i, (c, m) in enumerate(ERRORS)])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)
