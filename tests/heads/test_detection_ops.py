"""Without this a primitive of a detector could drift unseen where no whole head is recorded: anchors, matching, costs,
losses and positions are compared with what MMDetection's and torchvision's own functions gave."""

import probe
import pytest
import torch
from torch.nn.functional import one_hot
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_convert, clip_boxes_to_image, sigmoid_focal_loss

from densezoo.heads import PyramidInfo, detection
from densezoo.heads.atss import match_by_statistics
from densezoo.heads.gfl import distribution_focal_loss, quality_focal_loss
from densezoo.heads.hungarian import hungarian
from densezoo.heads.one_stage import IOU_LOSSES
from densezoo.heads.roi_align import cut_by_kernel, cut_by_matrices
from densezoo.heads.set_prediction import Objects, matching_costs, pairwise_giou
from densezoo.heads.transformer import padding_of, sine_positions
from densezoo.kernels import apart, suppress_by_products

CASES = {case['name']: case['outputs'] for case in probe.load('heads/detection_ops_mmdet')['cases']}
TORCHVISION = {case['name']: case['outputs'] for case in probe.load('heads/detection_ops_torchvision')['cases']}
SIZE = (256, 320)
TRUTH = torch.tensor([[20.0, 30, 120, 140], [100, 60, 300, 220], [5, 5, 60, 50], [200, 10, 230, 40]])
INFO = PyramidInfo([1, 1, 1], [8, 16, 32])


def boxes(seed, count=12):
    u = probe.image(seed, (count, 4)).sigmoid()
    centre, half = u[:, :2] * torch.tensor([320.0, 256]), (10 + u[:, 2:] * torch.tensor([120.0, 100])) / 2
    return torch.cat([centre - half, centre + half], 1)


def anchors_of(sizes, aspect_ratios):
    anchors = detection.PyramidAnchors(
        info=INFO, sizes=sizes, aspect_ratios=aspect_ratios, offset=0.0, exact_strides=True, exact_sizes=True
    )
    return anchors.on([torch.zeros(1, 1, 256 // s, 320 // s) for s in INFO.reduction()])


def retinanet_anchors():
    return anchors_of([[4 * s * 2 ** (i / 3) for i in range(3)] for s in INFO.reduction()], (0.5, 1.0, 2.0))


def ground_truth():
    target = {'boxes': TRUTH, 'labels': torch.zeros(4, dtype=torch.int64)}
    return detection.gather_targets([target], 1, torch.device('cpu'))


def test_offsets():
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))  # as ATSS and Cascade R-CNN have it
    probe.compare(coder.encode_single(boxes(1), boxes(6)), CASES['delta_coder']['encode'])
    decoded = clip_boxes_to_image(coder.decode_single(2 * probe.image(7, [12, 4]), boxes(6)), SIZE)
    probe.compare(decoded, CASES['delta_coder']['decode'])


def test_anchors_and_points():
    anchors = torch.cat(retinanet_anchors())
    probe.compare(anchors, CASES['mmdet_anchors']['all'])
    first = torch.tensor(CASES['mmdet_anchors']['first'])
    torch.testing.assert_close(anchors[: len(first)], first)
    info = PyramidInfo([1, 1], [8, 16])
    cells = detection.PyramidAnchors(
        info=info, sizes=[(8,), (16,)], aspect_ratios=(1.0,), offset=0.5, exact_strides=True
    ).on([torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 2, 3)])
    assert box_convert(torch.cat(cells), 'xyxy', 'cxcywh')[:, :2].tolist() == CASES['mmdet_points']['all']


def assert_matched(matched, case):
    chosen = (matched >= 0).nonzero()[:, 0]
    assert chosen.tolist() == case['pos']
    assert (matched[chosen] + 1).tolist() == case['gt']


def test_retinanet_matching():
    matched = detection.match_by_iou(
        ground_truth(), torch.cat(retinanet_anchors()), high=0.5, low=0.4, low_quality='box'
    )[0]
    assert_matched(matched, CASES['max_iou_retina'])
    assert (matched == detection.BACKGROUND).sum() == CASES['max_iou_retina']['n_neg']
    assert (matched == detection.IGNORED).sum() == CASES['max_iou_retina']['n_ignore']


def test_atss_matching():
    levels = anchors_of([[8 * s] for s in INFO.reduction()], (1.0,))
    assert_matched(match_by_statistics(ground_truth(), levels, 9)[0], CASES['atss'])


@pytest.mark.parametrize(('name', 'classes', 'weights'), [('detr', 11, (1, 5, 2)), ('deformable', 10, (2, 5, 2))])
def test_set_prediction_costs_and_matches(name, classes, weights):
    case = CASES[f'hungarian_{name}']
    predicted = probe.image(14, [20, 4]).sigmoid() * 0.5 + 0.2
    wanted = box_convert(TRUTH, 'xyxy', 'cxcywh') / torch.tensor([320.0, 256, 320, 256])
    truth = Objects(wanted[None], torch.tensor([[1, 3, 7, 2]]), [4], torch.tensor(4.0))
    logits = probe.image(15, [20, classes])
    costs = matching_costs(logits[None], predicted[None], truth, softmax=classes == 11, weights=weights)
    torch.testing.assert_close(costs[0], torch.tensor(case['cost']), rtol=1e-4, atol=1e-4)
    assert (hungarian(costs, [4])[0] + 1).tolist() == case['gt_inds']


def test_box_losses():
    predicted, wanted = boxes(16) + 8 * probe.image(17, [12, 4]), boxes(16)
    # ciou is torchvision's: MMDetection leaves its term of shapes out of pairs whose IoU is at most 0.5
    for ours, theirs in (('iou', 'iou_log'), ('giou', 'giou'), ('diou', 'diou')):
        loss = IOU_LOSSES[ours](predicted, wanted, reduction='none').mean()
        assert loss.item() == pytest.approx(CASES['iou_losses'][theirs], rel=1e-4)


def test_class_and_distribution_losses():
    case = CASES['qfl_dfl_focal']
    logits, labels = probe.image(4, [30, 5]), torch.arange(30) % 6
    hot = one_hot(labels, 6)[:, :5].float()  # label 5 is background
    quality = hot * probe.image(18, [30]).sigmoid()[:, None]
    assert quality_focal_loss(logits, quality, 2.0).sum(1).mean().item() == pytest.approx(case['qfl'], rel=1e-4)
    assert sigmoid_focal_loss(logits, hot, reduction='mean').item() == pytest.approx(case['focal_mean'], rel=1e-4)
    distance = probe.image(20, [12]).sigmoid() * 15
    loss = distribution_focal_loss(probe.image(19, [12, 17]), distance).mean()
    assert loss.item() == pytest.approx(case['dfl'], rel=1e-4)


@pytest.mark.parametrize(('name', 'offset'), [('detr', 0.0), ('deformable', -0.5)])
def test_positions_of_a_padded_batch(name, offset):
    valid = torch.tensor([[10, 12], [7, 9]])
    positions = sine_positions(10, 12, 32, valid, torch.device('cpu'), offset).transpose(1, 2).flatten()
    seen = ~padding_of(valid, 10, 12)[:, None].expand(-1, 32, -1).flatten()
    recorded = CASES['sine_position'][name]
    index = torch.tensor(recorded['index'])
    kept = seen[index]  # what stands in the padding is ours: nothing looks there
    assert 40 < kept.sum() < len(kept)
    torch.testing.assert_close(positions[index[kept]], torch.tensor(recorded['values'])[kept], rtol=1e-4, atol=1e-4)


# torchvision's, where we compute the same in another way


def test_overlaps():
    probe.compare(pairwise_giou(boxes(0, 40), boxes(1)), TORCHVISION['iou']['giou'])


@pytest.mark.parametrize(('name', 'threshold'), [('nms_05', 0.5), ('nms_03', 0.3), ('batched_03', 0.3)])
def test_suppression(name, threshold):
    scores, candidates = probe.image(2, [40]).sigmoid(), boxes(0, 40)
    if name == 'batched_03':
        candidates = apart(candidates[None], (torch.arange(40) % 3)[None])[0]
    keep = suppress_by_products(candidates[None], scores[None], threshold)[0]
    order = scores.argsort(descending=True)
    assert order[keep[order]].tolist() == TORCHVISION['nms'][name]


@pytest.mark.parametrize('cut', [cut_by_matrices, cut_by_kernel])
@pytest.mark.parametrize('side', [7, 14])
def test_regions(cut, side):
    picture = torch.arange(12) % 2
    order = picture.argsort(stable=True)
    cuts = cut(probe.image(3, [2, 8, 32, 40]), boxes(1)[order] / 8, picture[order], side)
    probe.compare(cuts[order.argsort()], TORCHVISION['roi_align'][f'out{side}_sr2_aligned0'])


def test_torchvision_anchors():
    anchors = detection.PyramidAnchors(
        info=PyramidInfo([1, 1], [8, 16]),
        sizes=((32, 40, 50), (64, 70, 80)),
        aspect_ratios=(0.5, 1.0, 2.0),
        offset=0.0,
        exact_strides=False,
    )
    first, _ = anchors.on([torch.zeros(1, 1, 8, 10), torch.zeros(1, 1, 4, 5)])
    recorded = torch.tensor(TORCHVISION['tv_anchors']['first'])  # the other level has one size there, ours as many
    torch.testing.assert_close(first[: len(recorded)], recorded)
