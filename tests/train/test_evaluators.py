"""Evaluators: a wrong metric makes every table of the project wrong, silently. Checked against numbers worked out by
hand, BasicSR's own values (tests/goldens/heads/metrics.json), two parts merged as two ranks would, and ugly input."""

import json
import math
import pathlib
import pickle

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from pycocotools import mask as run_length

from densezoo.data.degradations import GaussianNoise, gaussian_blur
from densezoo.train.evaluators import Accuracy, CocoMetric, RestorationMetric, SegmentationMetric, psnr, ssim
from densezoo.train.evaluators import base as metric_base
from densezoo.train.evaluators.boundary import boundary_f

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'goldens/heads/metrics.json').read_text())
PICTURE = torch.zeros(3, 4, 4)


def process(metric, targets, results, images=None):
    targets = [{'index': number, 'image_id': number + 1, **target} for number, target in enumerate(targets)]
    metric.process({'images': images or [PICTURE] * len(targets), 'targets': targets}, results)
    return metric


def evaluate(metric, targets, results, images=None):
    return process(metric, targets, results, images).evaluate(len(targets))


def merged(make, monkeypatch, targets, results, images=None):
    """As two ranks of an interleaving sampler would gather it, the last sample repeated as padding."""
    parts = []
    for rank in range(2):
        chosen = [*range(rank, len(targets), 2), len(targets) - 1]
        metric = make()
        metric.process(
            {
                'images': [images[i] if images else PICTURE for i in chosen],
                'targets': [{'index': i, 'image_id': i + 1, **targets[i]} for i in chosen],
            },
            [results[i] for i in chosen],
        )
        parts.append(pickle.loads(pickle.dumps(metric.results)))
    metric = make()
    with monkeypatch.context() as patch:
        patch.setattr(metric_base, 'all_gather_object', lambda _: parts)
        return metric.evaluate(len(targets))


# -------------------------------------------------------------------------------------------------- accuracy


def test_accuracy_by_hand():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.35, 0.25]])
    labels = [1, 1, 0, 2]  # ranks 0, 1, 2, 2
    metrics = evaluate(
        Accuracy(topk=(1, 2, 5)),
        [{'label': label} for label in labels],
        [{'scores': row, 'label': int(row.argmax())} for row in scores],
    )
    assert metrics == {'accuracy/top1': 0.25, 'accuracy/top2': 0.5, 'accuracy/top5': 1.0}


def test_accuracy_of_answers_that_say_nothing():
    same = evaluate(Accuracy(topk=(1, 2)), [{'label': label} for label in range(4)], [{'scores': torch.ones(4)}] * 4)
    assert same == {'accuracy/top1': 0.25, 'accuracy/top2': 0.5}
    broken = evaluate(Accuracy(topk=(1, 5)), [{'label': 0}], [{'scores': torch.full((3,), float('nan'))}])
    assert broken == {'accuracy/top1': 0.0, 'accuracy/top5': 0.0}


# ------------------------------------------------------------------------------------------------------ coco


def circles(size=64):
    """Two images with two discs each: (mask (H, W) bool, label)."""
    y, x = np.mgrid[:size, :size]
    discs = [[(16, 16, 9, 0), (44, 40, 13, 1)], [(30, 30, 12, 1), (50, 12, 8, 0)]]
    return [[((y - cy) ** 2 + (x - cx) ** 2 <= radius**2, label) for cy, cx, radius, label in image] for image in discs]


@pytest.fixture
def coco_meta(tmp_path):
    images, annotations = [], []
    for number, objects in enumerate(circles()):
        images.append({'id': number + 1, 'file_name': f'{number}.png', 'height': 64, 'width': 64})
        for mask, label in objects:
            code = run_length.encode(np.asfortranarray(mask, dtype=np.uint8))
            code['counts'] = code['counts'].decode()
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': number + 1,
                    'category_id': (3, 7)[label],
                    'iscrowd': 0,
                    'segmentation': code,
                    'area': int(mask.sum()),
                    'bbox': [float(v) for v in run_length.toBbox(code)],
                }
            )
    crowd = np.zeros((64, 64), dtype=np.uint8)
    crowd[50:, 40:] = 1
    code = run_length.encode(np.asfortranarray(crowd))
    code['counts'] = code['counts'].decode()
    annotations.append(
        {
            'id': len(annotations) + 1,
            'image_id': 2,
            'category_id': 3,
            'iscrowd': 1,
            'segmentation': code,
            'area': int(crowd.sum()),
            'bbox': [40, 50, 24, 14],
        }
    )
    file = tmp_path / 'truth.json'
    categories = [{'id': 3, 'name': 'small'}, {'id': 7, 'name': 'large'}]
    file.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))
    return {'ann_file': str(file), 'category_ids': [3, 7], 'classes': ('small', 'large')}


def perfect(score=0.9):
    results = []
    for objects in circles():
        masks = torch.from_numpy(np.stack([mask for mask, _ in objects]))
        boxes = torch.stack(
            [
                torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                for rows, columns in (mask.nonzero(as_tuple=True) for mask in masks)
            ]
        ).float()
        results.append(
            {
                'boxes': boxes,
                'labels': torch.tensor([label for _, label in objects]),
                'masks': masks,
                'scores': torch.full((len(objects),), score),
            }
        )
    return results


def coco_metric(meta, **options):
    metric = CocoMetric(iou_types=('bbox', 'segm'), **options)
    metric.dataset_meta = meta
    return metric


TARGETS = [{'original_size': (64, 64), 'file': f'{i}.png'} for i in range(2)]


def test_coco_perfect_predictions(coco_meta, capsys):
    metrics = evaluate(coco_metric(coco_meta, classwise=True), TARGETS, perfect())
    for kind in ('bbox', 'segm'):
        for name in ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'AR_100', 'AP_small', 'AP_large'):
            assert metrics[f'coco/{kind}_{name}'] == pytest.approx(1.0), name
        assert metrics[f'coco/{kind}_mAP_l'] == -1.0  # no large object in the truth
    assert capsys.readouterr().out == ''


def test_coco_no_predictions_at_all(coco_meta):
    nothing = {
        'boxes': torch.zeros(0, 4),
        'labels': torch.zeros(0, dtype=torch.int64),
        'scores': torch.zeros(0),
        'masks': torch.zeros(0, 64, 64, dtype=torch.bool),
    }
    metrics = evaluate(coco_metric(coco_meta), TARGETS, [nothing, nothing])
    for name in ('mAP', 'mAP_50', 'mAP_s'):
        assert metrics[f'coco/bbox_{name}'] == metrics[f'coco/segm_{name}'] == 0.0


def test_coco_by_hand(coco_meta):
    """One of two objects of a class found, nothing false: precision 1 up to recall 1/2 -> AP = 51/101 of 101 points."""
    results = perfect()
    for key in results[0]:  # image 0 keeps 'large' only, image 1 keeps both
        results[0][key] = results[0][key][1:]
    metrics = evaluate(coco_metric(coco_meta), TARGETS, results)
    assert metrics['coco/bbox_mAP_50'] == pytest.approx((1 + 51 / 101) / 2)
    shifted = perfect()
    for result in shifted:  # a third of the width to the right: IoU about 1/2, below the threshold 0.75
        width = result['boxes'][:, 2:3] - result['boxes'][:, :1]
        result['boxes'] = result['boxes'] + torch.tensor([0.33, 0, 0.33, 0]) * width
    metrics = evaluate(coco_metric(coco_meta), TARGETS, shifted)
    assert metrics['coco/bbox_mAP_50'] == pytest.approx(1.0) and metrics['coco/bbox_mAP_75'] == 0.0
    assert metrics['coco/bbox_mAP'] == pytest.approx(0.1)  # at IoU 0.50 alone of ten thresholds
    wrong_class = [{**result, 'labels': 1 - result['labels']} for result in perfect()]
    assert evaluate(coco_metric(coco_meta), TARGETS, wrong_class)['coco/segm_mAP_50'] == 0.0


def test_coco_detections_in_a_crowd_do_not_count(coco_meta):
    # a false detection before two right ones makes the precision of its class 2/3; rows and columns of the area
    for area, wanted in (((51, 62, 42, 60), 1.0), ((2, 12, 50, 62), (1 + 2 / 3) / 2)):
        results = perfect(score=0.5)
        extra = torch.zeros(1, 64, 64, dtype=torch.bool)
        extra[:, area[0] : area[1], area[2] : area[3]] = True
        box = torch.tensor([[area[2], area[0], area[3], area[1]]]).float()
        more = {'boxes': box, 'labels': torch.tensor([0]), 'masks': extra, 'scores': torch.tensor([0.9])}
        results[1] = {key: torch.cat([more[key], results[1][key]]) for key in more}
        metrics = evaluate(coco_metric(coco_meta), TARGETS, results)
        assert metrics['coco/bbox_mAP_50'] == pytest.approx(wanted)
        assert metrics['coco/segm_mAP_50'] == metrics['coco/bbox_mAP_50']


def test_coco_errors(coco_meta):
    with pytest.raises(ValueError, match=r"needs dataset_meta\['ann_file'\]"):
        evaluate(CocoMetric(), TARGETS, perfect())
    without = [{key: value for key, value in result.items() if key != 'masks'} for result in perfect()]
    with pytest.raises(ValueError, match="asks for 'segm' but the results hold no masks"):
        evaluate(coco_metric(coco_meta), TARGETS, without)
    with pytest.raises(ValueError, match=r'masks have size \(64, 64\), the picture \(32, 64\)'):
        evaluate(coco_metric(coco_meta), [{'original_size': (32, 64)}] * 2, perfect())
    with pytest.raises(ValueError, match=r'image_id 99 is not in .*truth\.json'):
        evaluate(coco_metric(coco_meta), [{'original_size': (64, 64), 'image_id': 99}] * 2, perfect())
    with pytest.raises(ValueError, match="iou_types must be of 'bbox', 'segm', got iou_types=\\('box',\\)"):
        CocoMetric(iou_types=('box',))


# ---------------------------------------------------------------------------------------------- segmentation


def test_segmentation_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 255, 255], [2, 2, 255, 255]])
    found = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 2, 0, 1], [2, 2, 2, 3]])
    metrics = evaluate(SegmentationMetric(num_classes=5, classwise=True), [{'mask': truth}], [{'mask': found}])
    # class 0: 3 right, union 4 + 1; class 1: 4 right, union 5; class 2: 3 right, union 4; 3 and 4: nowhere that counts
    assert metrics['mIoU'] == pytest.approx((3 / 5 + 4 / 5 + 3 / 4) / 3)
    assert metrics['mAcc'] == pytest.approx((3 / 4 + 1 + 3 / 4) / 3)
    assert metrics['aAcc'] == pytest.approx(10 / 12)
    assert metrics['IoU/0'] == pytest.approx(3 / 5) and metrics['IoU/4'] == -1.0


def test_segmentation_extremes():
    truth = torch.zeros(20, 30, dtype=torch.int64)
    truth[5:15, 5:12] = 1
    metric = SegmentationMetric()
    metric.dataset_meta = {'classes': ('ground', 'thing', 'never')}
    assert evaluate(metric, [{'mask': truth}], [{'mask': truth.clone()}]) == {
        'mIoU': 1.0,
        'mAcc': 1.0,
        'aAcc': 1.0,
        'boundary_F': 1.0,
    }
    everything = evaluate(metric, [{'mask': truth}], [{'mask': torch.full_like(truth, 2)}])
    assert everything == {'mIoU': 0.0, 'mAcc': 0.0, 'aAcc': 0.0, 'boundary_F': 0.0}
    ignored = evaluate(metric, [{'mask': torch.full_like(truth, 255)}], [{'mask': truth}])
    assert ignored == {'mIoU': 0.0, 'mAcc': 0.0, 'aAcc': 0.0, 'boundary_F': 0.0}


def test_boundary_f_counts_pixels_within_the_tolerance():
    truth = np.zeros((60, 60), dtype=bool)
    truth[20:40, 20:40] = True
    valid = np.ones_like(truth)
    for shift, radius, score in ((0, 1, 1.0), (1, 1, 1.0), (3, 3, 1.0), (30, 2, 0.0)):
        assert boundary_f(truth, np.roll(truth, shift, 1), valid, radius) == pytest.approx(score)
    # shifted by 3 to the right at tolerance 1, of 76 boundary pixels: 18 above, 18 below and 2 of one side hit
    assert boundary_f(truth, np.roll(truth, 3, 1), valid, 1) == pytest.approx(38 / 76)
    assert boundary_f(truth, np.zeros_like(truth), valid, 3) == 0.0
    assert boundary_f(valid, valid, valid, 3) is None  # no boundary: the rim of the picture is none
    # a true square that ends in an ignored region has no boundary there
    half = valid.copy()
    half[:, 30:] = False
    wider = np.zeros_like(truth)
    wider[20:40, 20:55] = True
    assert boundary_f(truth & half, wider, half, 1) == 1.0


def test_segmentation_errors():
    metric = SegmentationMetric(num_classes=2)
    mask = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'x\.png: the predicted mask has size \(2, 4\), the truth \(4, 4\)'):
        evaluate(metric, [{'mask': mask, 'file': 'x.png'}], [{'mask': mask[:2]}])
    with pytest.raises(ValueError, match=r'class ids of the truth must be 0\.\.1, got 0\.\.7'):
        evaluate(metric, [{'mask': mask + 7 * torch.eye(4, dtype=torch.int64)}], [{'mask': mask}])
    with pytest.raises(ValueError, match=r"needs num_classes= or dataset_meta\['classes'\]"):
        evaluate(SegmentationMetric(), [{'mask': mask}], [{'mask': mask}])


# ----------------------------------------------------------------------------------------------- restoration


def golden_pair(case):
    height, width, channels = case['shape']
    y, x, k = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing='ij')
    checks = 60 * ((y // 8 + x // 8) % 2)
    first = (3 * y + 5 * x + 40 * k + (y * x) // 7 + checks + 13 * case['image']) % 256
    noise = np.random.default_rng(case['seed']).standard_normal(case['shape']).astype(np.float32)
    second = np.clip(first + np.round(8 * noise), 0, 255)
    return first.astype(np.uint8)[..., ::-1], second.astype(np.uint8)[..., ::-1]  # stored as BGR


@pytest.mark.parametrize('case', [case for case in GOLDEN['cases'] if 'seed' in case], ids=lambda case: case['name'])
def test_psnr_and_ssim_equal_basicsr(case):
    options = {'crop_border': case['crop_border'], 'y_channel': case['test_y_channel']}
    first, second = golden_pair(case)
    assert psnr(first, second, **options) == pytest.approx(case['outputs']['psnr'], abs=1e-9)
    assert ssim(first, second, **options) == pytest.approx(case['outputs']['ssim'], abs=1e-9)
    assert psnr(first, first, **options) == math.inf and ssim(first, first, **options) == pytest.approx(1.0)


def textured(seed, size=48):
    torch.manual_seed(seed)
    return gaussian_blur(torch.rand(3, size, size), 1.5).sub(0.5).mul(4).add(0.5).clamp(0, 1)


def test_restoration_reports_baselines():
    clean = [textured(seed) for seed in range(3)]
    noisy = [GaussianNoise(sigma=25)(image) for image in clean]
    metric = RestorationMetric()
    targets = [{'clean': image} for image in clean]
    metrics = evaluate(metric, targets, [{'image': image} for image in noisy], noisy)
    assert metrics['psnr'] == metrics['psnr_input'] and metrics['psnr_gain'] == 0.0
    assert 20 < metrics['psnr_input'] < 21
    assert metrics['psnr_blur'] > metrics['psnr_input'] + 2
    assert metrics['psnr_nlm'] > metrics['psnr_input']
    assert metrics['psnr_over_blur'] == pytest.approx(metrics['psnr'] - metrics['psnr_blur'])
    # blurring by the best sigma by hand reaches the baseline, no sigma passes it
    by_hand = []
    for sigma in (0.5, 0.7, 0.8, 1.0, 1.2, 2.0):
        blurred = [{'image': gaussian_blur(image, sigma)} for image in noisy]
        by_hand.append(evaluate(metric, targets, blurred, noisy)['psnr_over_blur'])
    assert max(by_hand) == pytest.approx(0.0, abs=1e-6)


def test_restoration_options():
    clean, noisy = textured(0), GaussianNoise(sigma=25)(textured(0))
    plain = evaluate(RestorationMetric(baselines=()), [{'clean': clean}], [{'image': noisy}])
    assert set(plain) == {'psnr', 'ssim'}
    luma = evaluate(RestorationMetric(baselines=(), y_channel=True), [{'clean': clean}], [{'image': noisy}])
    assert luma['psnr'] > plain['psnr'] + 2  # noise of three channels averages out
    spoiled = noisy.clone()
    spoiled[:, :4] = 0
    assert evaluate(
        RestorationMetric(baselines=(), crop_border=4), [{'clean': clean}], [{'image': spoiled}]
    ) == evaluate(RestorationMetric(baselines=(), crop_border=4), [{'clean': clean}], [{'image': noisy}])
    outside = evaluate(RestorationMetric(baselines=()), [{'clean': clean}], [{'image': clean + 7 * (clean == 1)}])
    assert outside['psnr'] == math.inf  # clamped as a picture is
    with pytest.raises(ValueError, match=r"baselines must be of input, blur, nlm, telea, got baselines=\('bm3d',\)"):
        RestorationMetric(baselines=('bm3d',))
    with pytest.raises(ValueError, match=r'restored picture has size \(48, 47\), the clean one \(48, 48\)'):
        evaluate(RestorationMetric(), [{'clean': clean}], [{'image': noisy[..., 1:]}])
    with pytest.raises(ValueError, match='crop_border=24 leaves nothing'):
        psnr(np.zeros((48, 48, 3)), np.zeros((48, 48, 3)), crop_border=24)
    with pytest.raises(ValueError, match='at least 11x11'):
        ssim(np.zeros((12, 12, 3)), np.zeros((12, 12, 3)), crop_border=1)


# -------------------------------------------------------------------------------------------------- together


def test_two_ranks_equal_one_pass(coco_meta, monkeypatch):
    torch.manual_seed(0)
    masks = [torch.randint(0, 4, (24, 30)) for _ in range(5)]
    clean = [textured(seed) for seed in range(5)]
    noisy = [GaussianNoise(sigma=20)(image) for image in clean]
    scores = torch.rand(5, 6)
    cases = [
        (lambda: Accuracy(topk=(1, 3)), [{'label': i} for i in range(5)], [{'scores': row} for row in scores], None),
        (lambda: coco_metric(coco_meta), TARGETS, [perfect()[0], perfect(0.2)[1]], None),
        (
            lambda: SegmentationMetric(num_classes=4),
            [{'mask': mask} for mask in masks],
            [{'mask': mask.roll(1, 0)} for mask in masks],
            None,
        ),
        (
            lambda: RestorationMetric(baselines=('input', 'blur')),
            [{'clean': image} for image in clean],
            [{'image': gaussian_blur(image, 1)} for image in noisy],
            noisy,
        ),
    ]
    for make, targets, results, images in cases:
        assert merged(make, monkeypatch, targets, results, images) == evaluate(make(), targets, results, images)


def test_measurements_are_small():
    """What travels between ranks grows with the content, not with the pixels."""
    truth = torch.zeros(1000, 1000, dtype=torch.int64)
    truth[200:700, 300:900] = 149
    metric = process(SegmentationMetric(num_classes=150), [{'mask': truth}], [{'mask': truth}])
    assert len(pickle.dumps(metric.results)) < 2000


def test_inside_mmengines_evaluator(capfd):
    evaluator = Evaluator([{'type': Accuracy, 'topk': (1,)}, {'type': SegmentationMetric, 'num_classes': 2}])
    evaluator.dataset_meta = {'classes': ('a', 'b')}
    mask = torch.ones(6, 6, dtype=torch.int64)
    batch = {'images': [PICTURE], 'targets': [{'index': 0, 'label': 1, 'mask': mask}]}
    evaluator.process(data_samples=[{'scores': torch.tensor([0.1, 0.9]), 'mask': mask}], data_batch=batch)
    metrics = evaluator.evaluate(1)
    assert metrics['accuracy/top1'] == 1.0 and metrics['mIoU'] == 1.0
    assert all(isinstance(value, float) for value in metrics.values())
    assert 'prefix' not in capfd.readouterr().err
    json.dumps(metrics)


def test_nothing_and_mismatches_are_named():
    with pytest.raises(ValueError, match='Accuracy has nothing to evaluate'):
        Accuracy().evaluate(0)
    with pytest.raises(ValueError, match='one result per image, got 1 results for 2 targets'):
        process(Accuracy(), [{'label': 0}, {'label': 0}], [{'scores': torch.ones(2)}])
    with pytest.raises(ValueError, match='label=5 is not among the 2 classes'):
        process(Accuracy(), [{'label': 5}], [{'scores': torch.ones(2)}])
    with pytest.raises(ValueError, match=r'topk must be positive whole numbers, got topk=\(0,\)'):
        Accuracy(topk=(0,))
    metric = process(Accuracy(), [{'label': 0}], [{'scores': torch.ones(2)}])
    metric.evaluate(1)
    with pytest.raises(ValueError, match='nothing to evaluate'):  # each validation starts afresh
        metric.evaluate(1)
