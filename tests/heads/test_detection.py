"""Without this batched matching could silently differ from torchvision's, or a perfect network not be rewarded:
matching is compared picture by picture; outputs built from the targets must cost nothing and decode to the boxes."""

import probe
import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_iou, clip_boxes_to_image, roi_align
from torchvision.ops.poolers import LevelMapper

from densezoo.heads import FCOS, CascadeRCNN, MaskRCNN, PyramidInfo, RetinaNet, detection, fcos
from densezoo.heads.roi_align import cut_by_kernel, cut_by_matrices, levels_of
from densezoo.kernels import suppress_by_products

INFO = PyramidInfo([16, 16, 16], [8, 16, 32])
SIZE = (96, 128)


def maps(info=INFO, batch=3, size=SIZE):
    return [
        torch.zeros(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(info.channels(), info.reduction())
    ]


def random_boxes(count, seed):
    corner = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 60
    side = 8 + 40 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 100))
    return torch.cat([corner, corner + side], 1)


def truth(*counts):
    targets = [{'boxes': random_boxes(n, i), 'labels': torch.arange(n) % 5} for i, n in enumerate(counts)]
    return targets, detection.gather_targets(targets, 5, torch.device('cpu'))


@pytest.mark.parametrize('counts', [(3, 0, 1), (0, 0), (2, 2), (7,), (1, 5, 0, 2)], ids=str)
@pytest.mark.parametrize('low_quality', ['best', 'none'])
def test_matching_equals_torchvision(counts, low_quality):
    targets, batch = truth(*counts)
    anchors = random_boxes(400, 50)
    ours = detection.match_by_iou(batch, anchors, high=0.5, low=0.4, low_quality=low_quality)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality == 'best')
    for target, matched in zip(targets, ours, strict=True):
        expected = torch.full((400,), -1)
        if len(target['boxes']):
            expected = matcher(box_iou(target['boxes'], anchors))
        assert torch.equal(matched, expected)
    rows = batch.rows(ours)
    for i, target in enumerate(targets):
        hit = ours[i] >= 0
        assert torch.equal(batch.boxes[rows[i][hit]], target['boxes'][ours[i][hit]])
        assert (rows[i][~hit] == sum(counts)).all()
    assert (ours >= 0).any() == (sum(counts) > 0)


def test_matching_equals_the_recorded():
    """The matcher case of torchvision's reference: 12 boxes, 40 anchors, thresholds 0.4 and 0.2.

    Only without low-quality matches: one of those boxes meets no anchor, and there takes all that have no other.
    """
    case = next(c for c in probe.load('heads/detection_ops_torchvision')['cases'] if c['name'] == 'matcher')

    def boxes(seed, count):
        u = torch.sigmoid(probe.image(seed, (count, 4)))
        centre, half = u[:, :2] * torch.tensor([320.0, 256]), (10 + u[:, 2:] * torch.tensor([120.0, 100])) / 2
        return torch.cat([centre - half, centre + half], 1)

    batch = detection.gather_targets([{'boxes': boxes(1, 12), 'labels': torch.zeros(12)}], 1, torch.device('cpu'))
    ours = detection.match_by_iou(batch, boxes(0, 40), high=0.4, low=0.2, low_quality='none')
    assert ours[0].tolist() == case['outputs']['low_quality_False']
    assert (box_iou(batch.real, boxes(0, 40)).amax(1) == 0).sum() == 1


@pytest.mark.parametrize(('low_quality', 'first'), [('best', 1), ('box', 2), ('none', 1)])
def test_whose_a_box_s_best_anchor_is(low_quality, first):
    """Anchor 0 is the best of boxes 0 and 2 (IoU 0.4) but overlaps box 1 more (0.83), whose best is anchor 1."""
    boxes = torch.tensor([[0.0, 0, 10, 4], [0, 0, 10, 12], [0, 0, 10, 4], [30, 30, 35, 40]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [30, 30, 40, 40], [60, 60, 70, 70]])
    batch = detection.gather_targets([{'boxes': boxes, 'labels': torch.zeros(4)}], 1, torch.device('cpu'))
    matched = detection.match_by_iou(batch, anchors, high=0.6, low=0.3, low_quality=low_quality)
    assert matched[0].tolist() == [first, 1, -2 if low_quality == 'none' else 3, -1]


def test_box_that_meets_no_anchor_takes_none():
    batch = detection.gather_targets(
        [{'boxes': torch.tensor([[500.0, 500, 520, 520]]), 'labels': torch.zeros(1)}], 1, torch.device('cpu')
    )
    assert (detection.match_by_iou(batch, random_boxes(20, 0), high=0.5, low=0.4) == -1).all()


def test_anchor_placement():
    """256x96 with stride 64 gives 4x2 maps: torchvision spaces columns by 96 // 2 = 48 pixels."""
    info = PyramidInfo([4], [64])
    features = [torch.zeros(1, 4, 4, 2)]
    wide = PyramidInfo([4, 4], [32, 64])
    both = [torch.zeros(1, 4, 8, 3), features[0]]

    def columns(anchors):
        return sorted({((a[0] + a[2]) / 2).item() for a in anchors})

    def build(info, sizes, **kw):
        return detection.PyramidAnchors(info=info, sizes=sizes, aspect_ratios=(1.0,), **kw)

    assert columns(build(info, [(8,)], offset=0.5, exact_strides=True).on(features)[0]) == [32, 96]
    assert columns(build(wide, [(8,), (8,)], offset=0.0, exact_strides=False).on(both)[1]) == [0, 48]
    assert columns(build(wide, [(8,), (8,)], offset=0.5, exact_strides=False).on(both)[1]) == [24, 72]
    assert columns(build(wide, [(8,), (8,)], offset=0.0, exact_strides=True).on(both)[1]) == [0, 64]


TARGETS = [
    {'boxes': torch.tensor([[4.0, 6, 44, 52], [50, 20, 110, 80]]), 'labels': torch.tensor([1, 4])},
    {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64)},
    {'boxes': torch.tensor([[12.0, 38, 92, 91]]), 'labels': torch.tensor([0])},
]


def perfect(head, matched, batch):
    """Class logits of a network that knows the answer, and for each anchor the row of its box."""
    rows = batch.rows(matched)
    logits = torch.full((*matched.shape, 5), -20.0)
    picture, anchor = (matched >= 0).nonzero(as_tuple=True)
    assert len(anchor)
    logits[picture, anchor, batch.labels[rows[picture, anchor]]] = 20.0
    return logits, rows


def assert_decodes(results):
    for result, target in zip(results, TARGETS, strict=True):
        order = result['labels'].argsort()
        wanted = target['labels'].argsort()
        assert result['labels'][order].tolist() == target['labels'][wanted].tolist()
        torch.testing.assert_close(result['boxes'][order], target['boxes'][wanted], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    'options', [{}, {'box_loss': 'giou', 'anchor_offset': 0.5, 'exact_strides': True}], ids=['published', 'giou']
)
def test_perfect_retinanet(options):
    head = RetinaNet(feature_info=INFO, num_classes=5, **options)
    batch = detection.gather_targets(TARGETS, 5, torch.device('cpu'))
    anchors = torch.cat(head.anchors.on(maps()))
    matched = detection.match_by_iou(batch, anchors, high=0.5, low=0.4)
    logits, rows = perfect(head, matched, batch)
    boxes = torch.where((matched >= 0)[..., None], batch.boxes[rows], anchors)
    offsets = torch.stack([head.box_coder.encode_single(b, anchors) for b in boxes])
    head.forward = lambda features: (logits, offsets)
    assert all(value.item() < 1e-4 for value in head.loss(maps(), TARGETS).values())
    assert_decodes(head.predict(maps(), [SIZE] * 3))
    assert (matched == detection.IGNORED).any()
    logits[matched == detection.IGNORED] = 20.0
    assert head.loss(maps(), TARGETS)['loss_cls'] < 1e-4
    logits.neg_()
    assert head.loss(maps(), TARGETS)['loss_cls'] > 10
    offsets.add_(1)
    assert head.loss(maps(), TARGETS)['loss_box'] > 0.5


@pytest.mark.parametrize('options', [{}, {'point_offset': 0.5, 'center_radius': None}], ids=['centre', 'inside'])
def test_perfect_fcos(options):
    head = FCOS(feature_info=INFO, num_classes=5, size_ranges=[(0, 32), (32, 64), (64, 128)], **options)
    batch = detection.gather_targets(TARGETS, 5, torch.device('cpu'))
    levels = head.anchors.on(maps())
    points = torch.cat(levels)
    matched = head._match(batch, points, detection.level_sizes(levels))
    assert {int(m) for m in matched[0]} == {-1, 0, 1}
    logits, rows = perfect(head, matched, batch)
    sides = head.box_coder.encode(points.expand(3, -1, -1), batch.boxes[rows])
    weight = torch.where(matched >= 0, fcos.centre_weight(sides.clamp(min=1e-3)), torch.zeros(()))
    centerness = torch.logit(weight, eps=1e-6)[..., None]
    head.forward = lambda features: (logits, sides.clamp(min=0), centerness)
    losses = head.loss(maps(), TARGETS)
    assert losses['loss_cls'] < 1e-4 and losses['loss_box'] < 1e-4
    assert_decodes(head.predict(maps(), [SIZE] * 3))
    for moved in (centerness + 1, centerness - 1):  # the targets' own entropy is the least there is
        head.forward = lambda features, moved=moved: (logits, sides.clamp(min=0), moved)
        assert head.loss(maps(), TARGETS)['loss_centerness'] > losses['loss_centerness']


def test_fcos_takes_the_smaller_of_two_boxes_and_the_level_of_its_size():
    head = FCOS(feature_info=INFO, num_classes=5)
    boxes = torch.tensor([[1.0, 1, 95, 95], [32, 32, 64, 64]])
    levels = head.anchors.on(maps(batch=1))
    points = torch.cat(levels)
    for order in ([0, 1], [1, 0]):
        batch = detection.gather_targets(
            [{'boxes': boxes[order], 'labels': torch.tensor(order)}], 5, torch.device('cpu')
        )
        matched = head._match(batch, points, detection.level_sizes(levels))[0]
        centre = ((points[:, :2] + points[:, 2:]) / 2 == 48).all(1)
        chosen = {order[i] for i in matched[centre & (matched >= 0)].tolist()}
        assert chosen == {1}
        fine, middle, coarse = matched.split(detection.level_sizes(levels))
        assert (fine >= 0).any() and (middle == -1).all() and (coarse == -1).all()


def test_perfect_mask_rcnn():
    """Known boxes through the second stage: ground truth joins the proposals, so wanted outputs are known as well."""
    torch.manual_seed(0)
    head = MaskRCNN(
        feature_info=INFO,
        num_classes=5,
        rpn_pre_nms=(20, 20),
        rpn_post_nms=(10, 10),
        mask_channels=8,
        mask_convs=1,
        box_channels=8,
        roi_foreground_iou=0.9,
    )
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 6:52, 4:44] = masks[1, 20:80, 50:110] = True  # each mask fills its box
    target = {**TARGETS[0], 'masks': masks}
    heads = head.roi_heads

    def predictor(vectors):
        boxes = heads.proposals[0]
        quality, index = box_iou(boxes, target['boxes']).max(1)
        logits = torch.full((len(boxes), 6), -20.0)
        logits[torch.arange(len(boxes)), torch.where(quality >= 0.9, target['labels'][index] + 1, 0)] = 20.0
        offsets = heads.box_coder.encode_single(target['boxes'][index], boxes)
        return logits, offsets.repeat(1, 6)

    pool = heads.box_roi_pool.forward
    heads.box_roi_pool.forward = lambda x, boxes, shapes: (setattr(heads, 'proposals', boxes), pool(x, boxes, shapes))[
        1
    ]
    heads.box_predictor.forward = predictor
    heads.mask_predictor.forward = lambda x: torch.full((len(x), 6, 28, 28), 5.0)
    losses = head.loss(maps(batch=1), [target])
    assert losses['loss_classifier'] < 1e-4 and losses['loss_box_reg'] < 1e-4 and losses['loss_mask'] < 0.3
    head.rpn.propose = lambda *args: ([torch.cat([target['boxes'] + 0.5, torch.tensor([[90.0, 0, 120, 9]])])], {})
    result = head.eval().predict(maps(batch=1), [SIZE])[0]
    order = result['labels'].argsort()
    assert result['labels'][order].tolist() == [1, 4]
    torch.testing.assert_close(result['boxes'][order], target['boxes'], rtol=1e-4, atol=1e-2)
    found = result['masks'][order]
    assert ((found & masks).sum((1, 2)) / (found | masks).sum((1, 2)) > 0.9).all()


def small_rcnn(**options):
    torch.manual_seed(0)
    return MaskRCNN(feature_info=INFO, num_classes=5, mask_channels=8, mask_convs=1, box_channels=8, **options)


def test_proposals_for_training_stay_in_the_picture():
    head, seen = small_rcnn(), []
    pool = head.roi_heads.box_roi_pool.forward
    head.roi_heads.box_roi_pool.forward = lambda x, boxes, shapes: (seen.extend(boxes), pool(x, boxes, shapes))[1]
    target = {'boxes': torch.tensor([[2.0, 2, 30, 30]]), 'labels': torch.tensor([0]), 'masks': torch.ones(1, 40, 50)}
    head.loss(maps(batch=2), [{**target, 'size': (40, 50)}, target])
    assert seen[0][:, 0::2].max() <= 50 and seen[0][:, 1::2].max() <= 40
    assert seen[1][:, 0::2].max() > 50 and seen[1][:, 1::2].max() > 40  # without `size` the whole batch is valid


def test_no_proposal_at_all():
    head = small_rcnn()
    propose = head.rpn.propose
    head.rpn.propose = lambda *args: ([torch.zeros(0, 4)], propose(*args)[1])
    nothing = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0).long(), 'masks': torch.zeros(0, *SIZE)}
    losses = head.loss(maps(batch=1), [nothing])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_levels_of_regions():
    boxes = torch.cat([random_boxes(300, 1) * 12, random_boxes(300, 2)])
    theirs = LevelMapper(2, 5)([boxes])
    assert torch.equal(levels_of(boxes, [4, 8, 16, 32]), theirs) and len(theirs.unique()) == 4
    # Strides with a gap: the level in between goes to the finer one.
    assert torch.equal(levels_of(boxes, [4, 16, 32]), torch.tensor([0, 0, 1, 2])[theirs])
    assert (levels_of(boxes, [8]) == 0).all()


@pytest.mark.parametrize('side', [1, 7, 14])
def test_both_ways_to_cut_regions_agree(side):
    """Values and gradients, with regions that reach over the border, lie outside, or are smaller than a cell."""
    torch.manual_seed(0)
    boxes = torch.cat(
        [
            random_boxes(20, 3) / 4,
            torch.tensor([[-9.0, -9, 4, 40], [20, 20, 50, 60], [40, 3, 44, 9], [3, 3, 3.2, 3.1], [0, 0, 16, 12]]),
        ]
    )
    picture = torch.tensor([0] * 9 + [2] * 16)
    grads = []
    for cut in (cut_by_kernel, cut_by_matrices):
        x = torch.randn(3, 5, 12, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = cut(x, boxes, picture, side)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        grads.append((out, x.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_regions_are_cut_at_the_declared_scale():
    """torchvision guesses the scale from the first valid size: 40 of 96 rows would pass for stride 4 instead of 8."""
    info = PyramidInfo([3], [8])
    head = MaskRCNN(feature_info=info, num_classes=2, box_pool=3)
    feature, box = torch.rand(1, 3, 12, 16), torch.tensor([[8.0, 8, 40, 30]])
    pooled = head.roi_heads.box_roi_pool(head._roi_maps([feature]), [box], [(40, 60)])
    expected = roi_align(feature, [box], 3, spatial_scale=1 / 8, sampling_ratio=2)
    torch.testing.assert_close(pooled, expected)


def test_regions_keep_their_order():
    """Regions of several levels and pictures come back as they were given; none at all is fine."""
    info = PyramidInfo([3, 3, 3], [4, 8, 16])
    pool = MaskRCNN(feature_info=info, num_classes=2, box_pool=3).roi_heads.box_roi_pool
    features = {str(i): x for i, x in enumerate(torch.rand(2, 3, 1024 // s, 1024 // s) for s in info.reduction())}
    boxes = [random_boxes(20, 1) * 8, random_boxes(30, 2) * 3]
    together = pool(features, boxes, [])
    assert len(levels_of(torch.cat(boxes), info.reduction()).unique()) == 3
    alone = [pool({k: v[i : i + 1] for k, v in features.items()}, [b[None]], []) for i in range(2) for b in boxes[i]]
    torch.testing.assert_close(together, torch.cat(alone))
    assert pool(features, [boxes[0][:0]] * 2, []).shape == (0, 3, 3, 3)


@torch.no_grad()
def test_equally_many_regions_are_cut_as_any_number_is():
    """The form for exported graphs, with maps of odd sizes, regions of all levels, and some over the border."""
    info = PyramidInfo([3, 3, 3], [4, 8, 16])
    pool = MaskRCNN(feature_info=info, num_classes=2, box_pool=3).roi_heads.box_roi_pool
    torch.manual_seed(0)
    maps = [torch.rand(2, 3, -(-500 // s), -(-700 // s)) for s in info.reduction()]
    boxes = torch.stack([torch.cat([random_boxes(20, i) * 7, random_boxes(10, i)]) for i in range(2)])
    boxes[0, 0], boxes[1, 3] = torch.tensor([690.0, 490, 700, 500]), torch.tensor([0.0, 0, 3, 900])
    assert len(levels_of(boxes, info.reduction()).unique()) == 3
    expected = pool({str(i): x for i, x in enumerate(maps)}, list(boxes), [])
    torch.testing.assert_close(pool.cut_equal(maps, boxes), expected, rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize('masks', [False, True])
def test_decoding_of_equal_numbers_is_the_prediction(masks):
    head = small_rcnn(masks=masks, mask_threshold=None).eval()
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(m.shape, generator=generator) for m in maps(batch=2)]
    for layer, factor in ((head.rpn.head.cls_logits, 30), (head.roi_heads.box_predictor.cls_score, 30)):
        layer.weight.mul_(factor)  # from nearly equal scores to clear ones
    found = head.predict(features, [SIZE, SIZE])
    boxes, scores, labels = head.decode(features)
    inner = head.roi_heads
    best = detection.best_equal(boxes, scores, labels, suppress=suppress_by_products, nms=inner.nms_thresh, limit=20,
                                score_threshold=inner.score_thresh, min_size=1e-2)  # fmt: skip
    soft = head.decode_masks(features, best[0], best[2]) if masks else None
    for i, result in enumerate(found):
        count = min(len(result['boxes']), 20)
        assert count > 3
        torch.testing.assert_close(best[1][i, :count], result['scores'][:count], rtol=0, atol=1e-5)
        torch.testing.assert_close(best[0][i, :count], result['boxes'][:count], rtol=0, atol=1e-2)
        assert torch.equal(best[2][i, :count], result['labels'][:count])
        if masks:
            pasted = paste_masks_in_image(soft[i, :count, None], result['boxes'][:count], SIZE)[:, 0]
            torch.testing.assert_close(pasted, result['masks'][:count], rtol=0, atol=1e-3)


def test_rows_that_hold_nothing_have_no_score():
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8.9], [20, 20, 20, 30]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 1, 0]])
    options = dict(suppress=suppress_by_products, nms=0.5, limit=5, min_size=0.0)
    _, best, found = detection.best_equal(boxes, scores, labels, score_threshold=0.1, **options)
    torch.testing.assert_close(best, torch.tensor([[0.9, 0, 0]]))
    assert found[0, 0] == 1
    assert not detection.best_equal(boxes, scores, labels, score_threshold=0.95, **options)[1].any()


def test_candidates_are_the_best_of_each_level():
    scores = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    anchor, label, score = detection.select_candidates(scores, [20, 10], 0.2, 5)
    assert len(anchor) == 10 and ((anchor < 20).sum() == 5)
    torch.testing.assert_close(score, scores[anchor, label])
    assert score[anchor >= 20].min() >= scores[20:].flatten().sort().values[-5]
    assert len(detection.select_candidates(scores, [20, 10], 1.0, 5)[0]) == 0


@pytest.mark.parametrize('kind', [RetinaNet, FCOS])
def test_anchors_on_the_padding_are_silent(kind):
    """A confident large box from an anchor beyond the picture would be clipped to something that looks plausible."""
    head = kind(feature_info=INFO, num_classes=5)
    x = torch.cat([(level[:, 0] + level[:, 2]) / 2 for level in head.anchors.on(maps(batch=1))])
    logits = torch.where(x[:, None] >= 64, 20.0, -20.0).expand(1, -1, 5)
    rest = torch.full((1, len(x), 4), 2.0 if kind is FCOS else 0.0), torch.full((1, len(x), 1), 20.0)
    head.forward = lambda features: (logits, *rest[: 2 if kind is FCOS else 1])
    assert len(head.predict(maps(batch=1), [SIZE])[0]['boxes']) > 0
    assert len(head.predict(maps(batch=1), [(96, 64)])[0]['boxes']) == 0


def test_kept_anchors_are_ordinary_tensors():
    anchors = RetinaNet(feature_info=INFO, num_classes=5).anchors
    with torch.inference_mode():
        first = anchors.on(maps())
    assert not any(level.is_inference() for level in first)
    assert all(a is b for a, b in zip(first, anchors.on(maps()), strict=True))
    assert len(anchors.on(maps(size=(32, 32)))[0]) == 16 * 9


def cascade(**options):
    torch.manual_seed(0)
    return CascadeRCNN(feature_info=INFO, num_classes=5, masks=False, box_channels=16, score_threshold=0.0,
                       detections=500, nms_threshold=1.0, **options).eval()  # fmt: skip


def test_stages_of_a_cascade_ask_for_more_overlap():
    wanted = torch.tensor([[0.0, 0, 20, 20]])
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 13], [0, 0, 20, 11], [0, 0, 20, 9], [50, 50, 60, 60]])
    found = [(stage.match(boxes, wanted) >= 0).tolist() for stage in cascade().stages]  # IoU 1, 0.65, 0.55, 0.45, 0
    assert found == [
        [True, True, True, False, False],
        [True, True, False, False, False],
        [True, False, False, False, False],
    ]
    assert (cascade().stages[0].match(boxes, wanted[:0]) == -1).all()


@torch.no_grad()
def test_a_cascade_moves_boxes_stage_by_stage():
    """Constant offsets: 0.1, 0.05 and 0.033 of a width to the right, as the coders' weights are 10, 20, 30."""
    head = cascade()
    for stage in head.stages:
        stage.bbox_pred.weight.zero_()
        stage.bbox_pred.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    features = [torch.randn_like(x) for x in maps(batch=2)]
    proposals = torch.stack([random_boxes(6, 3), random_boxes(6, 4)])
    levels = head._roi_maps(features)
    boxes, scores, labels = head.detect(levels, list(proposals), [SIZE] * 2)
    equal_scores, equal_boxes = head.detect_equal(features, proposals)
    shift = torch.zeros_like(proposals)
    shift[..., 0::2] = ((proposals[..., 2] - proposals[..., 0]) * (1 / 10 + 1 / 20 + 1 / 30))[..., None]
    torch.testing.assert_close(equal_boxes[:, :, 0], clip_boxes_to_image(proposals + shift, SIZE))
    for i in range(2):  # the same results, whether shapes are fixed or not
        assert len(boxes[i]) == 30 and labels[i].min() == 1
        torch.testing.assert_close(
            scores[i], equal_scores[i].flatten().sort(descending=True).values, rtol=1e-4, atol=1e-6
        )
        for box, score, label in zip(boxes[i][:5], scores[i], labels[i]):
            row = (equal_scores[i, :, label - 1] - score).abs().argmin()
            torch.testing.assert_close(equal_boxes[i, row, label - 1], box, rtol=1e-4, atol=1e-3)


def test_cascade_errors():
    with pytest.raises(ValueError, match=r'one value per stage, got \(0.5, 0.6\), \(1.0,\)'):
        cascade(stage_ious=(0.5, 0.6), stage_weights=(1.0,))
