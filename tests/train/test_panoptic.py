"""Without this panoptic quality could differ from panopticapi's, which every published figure was measured with: the
evaluator is compared with its rules written out pair by pair, on random scenes with crowds and unknown pixels."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from densezoo.train.evaluators import BoundaryMetric, PanopticMetric, SegmentationMetric
from densezoo.train.evaluators.panoptic import count
from densezoo.train.inference import Predictor

THINGS = (0, 2)
CLASSES = 5


def literal(truth, true_labels, crowd, found, labels):
    """panopticapi's rules for one image: {class: [sum of IoU, TP, FP, FN]}. Segment n has the class labels[n - 1]."""
    stat = defaultdict(lambda: [0.0, 0, 0, 0])
    true_ids = [n for n in range(1, len(true_labels) + 1) if (truth == n).any()]
    ids = [n for n in range(1, len(labels) + 1) if (found == n).any()]
    true_matched, matched = set(), set()
    for t in true_ids:
        for p in ids:
            common = int(((truth == t) & (found == p)).sum())
            if not common or crowd[t - 1] or true_labels[t - 1] != labels[p - 1]:
                continue
            unknown = int(((truth == 0) & (found == p)).sum())
            union = int((truth == t).sum()) + int((found == p).sum()) - common - unknown
            if common / union > 0.5:
                stat[int(labels[p - 1])][0] += common / union
                stat[int(labels[p - 1])][1] += 1
                true_matched.add(t)
                matched.add(p)
    crowd_of = {}
    for t in true_ids:
        if t in true_matched:
            continue
        if crowd[t - 1]:
            crowd_of[int(true_labels[t - 1])] = t
        else:
            stat[int(true_labels[t - 1])][3] += 1
    for p in ids:
        if p in matched:
            continue
        beyond = int(((truth == 0) & (found == p)).sum())
        if int(labels[p - 1]) in crowd_of:
            beyond += int(((truth == crowd_of[int(labels[p - 1])]) & (found == p)).sum())
        if beyond / int((found == p).sum()) <= 0.5:
            stat[int(labels[p - 1])][2] += 1
    return stat


def scene(rng, size=24, segments=6, things=True):
    """A map of overlapping rectangles, classes and crowds; some pixels stay 0."""
    ids = np.zeros((size, size), dtype=np.int64)
    for n in range(1, segments + 1):
        y, x = rng.integers(0, size - 4, 2)
        ids[y : y + rng.integers(2, 14), x : x + rng.integers(2, 14)] = n
    labels = rng.integers(0, CLASSES, segments)
    crowd = (rng.random(segments) < 0.3) & np.isin(labels, THINGS)
    return ids, labels, crowd


def disturbed(rng, ids, labels):
    """A prediction near the truth: shifted, with some labels wrong, some segments gone, some split."""
    found = np.roll(ids, rng.integers(-1, 2, 2), (0, 1))
    found[found == rng.integers(1, len(labels) + 1)] = 0
    split = rng.integers(1, len(labels) + 1)
    found[(found == split) & (np.arange(ids.shape[1]) > rng.integers(0, 24))] = len(labels) + 1
    labels = np.append(labels, labels[split - 1])
    wrong = rng.random(len(labels)) < 0.2
    return found, np.where(wrong, rng.integers(0, CLASSES, len(labels)), labels)


def test_counts_are_panopticapis():
    total = np.zeros(4)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth, true_labels, crowd = scene(rng)
        present = np.isin(np.arange(1, 7), truth)
        truth = np.concatenate([[0], np.cumsum(present) * present])[truth]  # hidden ones are no segments
        true_labels, crowd = true_labels[present], crowd[present]
        found, labels = disturbed(rng, truth, true_labels)
        ours = np.stack(count(truth, true_labels, crowd, found, labels, CLASSES))
        expected = literal(truth, true_labels, crowd, found, labels)
        for label in range(CLASSES):
            np.testing.assert_allclose(ours[:, label], expected[label], atol=1e-12, err_msg=f'{seed=} {label=}')
        total += ours.sum(1)
    assert (total[1:] > 40).all(), 'matches, false positives and misses must all occur'


def target_of(ids, labels, crowd=None):
    """A universal target whose panoptic map is `ids`."""
    ids = torch.as_tensor(ids)
    things = [n for n in range(1, len(labels) + 1) if labels[n - 1] in THINGS]
    mask = torch.full(ids.shape, 255)
    for n, label in enumerate(labels, 1):
        mask[ids == n] = int(label)
    return {
        'mask': mask,
        'masks': torch.stack([ids == n for n in things]) if things else torch.zeros(0, *ids.shape, dtype=torch.bool),
        'labels': torch.tensor([int(labels[n - 1]) for n in things], dtype=torch.int64),
        'iscrowd': torch.tensor([int(crowd[n - 1]) if crowd is not None else 0 for n in things], dtype=torch.int64),
    }


def evaluate(targets, results, **options):
    metric = PanopticMetric(**({'things': THINGS, 'num_classes': CLASSES} | options))
    targets = [{'index': i, **target} for i, target in enumerate(targets)]
    metric.process({'images': [None] * len(targets), 'targets': targets}, results)
    return metric.evaluate(len(targets))


def result(ids, labels):
    return {'panoptic': torch.as_tensor(ids), 'segment_labels': torch.as_tensor(labels, dtype=torch.int64)}


IDS = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])


def test_by_hand():
    """Class 0: an object of 8 found with 6 of them; class 2: missed, and one found where none is; class 1: exact."""
    found = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [2, 2, 3, 3], [2, 2, 3, 3]])
    metrics = evaluate([target_of(IDS, [0, 2, 1])], [result(found, [0, 0, 1])])
    # class 0: IoU 6/8, one false positive; class 2: a miss; class 1: exact
    assert metrics['panoptic/SQ'] == pytest.approx((0.75 + 0 + 1) / 3)
    assert metrics['panoptic/RQ'] == pytest.approx((1 / 1.5 + 0 + 1) / 3)
    assert metrics['panoptic/PQ'] == pytest.approx((0.5 + 0 + 1) / 3)
    assert metrics['panoptic/PQ_things'] == pytest.approx(0.25) and metrics['panoptic/PQ_stuff'] == 1.0


def test_averages_are_over_all_images_and_the_classes_that_occur():
    exact = target_of(IDS, [0, 2, 1]), result(IDS, [0, 2, 1])
    assert set(evaluate([exact[0]], [exact[1]]).values()) == {1.0}
    nothing = result(torch.zeros(4, 4, dtype=torch.int64), [])
    metrics = evaluate([exact[0]] * 2, [exact[1], nothing], classwise=True)
    assert metrics['panoptic/PQ'] == pytest.approx(2 / 3) and metrics['panoptic/SQ'] == 1.0
    assert metrics['PQ/0'] == pytest.approx(2 / 3) and metrics['PQ/3'] == metrics['PQ/4'] == -1.0


def test_unknown_and_crowds_are_neither_hit_nor_miss():
    unknown = target_of(torch.zeros(4, 4, dtype=torch.int64), [])
    zero = evaluate([unknown], [result(IDS, [0, 2, 1])])
    assert set(zero.values()) == {0.0}  # no class occurs
    crowd = target_of(IDS, [0, 2, 1], crowd=[1, 0, 0])
    # the crowd's four columns as four objects of its class, the rest exact
    found = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [5, 5, 6, 6], [5, 5, 6, 6]])
    metrics = evaluate([crowd], [result(found, [0, 0, 0, 0, 2, 1])], classwise=True)
    assert metrics['PQ/0'] == -1.0 and metrics['PQ/2'] == metrics['PQ/1'] == 1.0


def test_errors():
    target = target_of(IDS, [0, 2, 1])
    with pytest.raises(ValueError, match=r'the panoptic map has size \(2, 4\), the truth \(4, 4\)'):
        evaluate([target], [result(IDS[:2], [0, 2, 1])])
    with pytest.raises(ValueError, match=r'panoptic must hold 0\.\.2, as many segments as segment_labels, got 1\.\.3'):
        evaluate([target], [result(IDS, [0, 2])])
    with pytest.raises(ValueError, match=r'class ids of the prediction must be 0\.\.4, got 0\.\.5'):
        evaluate([target], [result(IDS, [0, 2, 5])])
    with pytest.raises(ValueError, match=r"needs things= or dataset_meta\['things'\]"):
        evaluate([target], [result(IDS, [0, 2, 1])], things=None)
    with pytest.raises(ValueError, match=r"needs num_classes= or dataset_meta\['classes'\]"):
        evaluate([target], [result(IDS, [0, 2, 1])], num_classes=None)


def test_predictions_are_written_as_a_map_and_its_segments(tmp_path):
    predictor = Predictor.__new__(Predictor)
    predictor.metainfo = {'classes': ('a', 'b', 'c')}
    entry = predictor.describe(result(IDS, [0, 2, 1]), {'file': 'x.png', 'original_size': (4, 4)}, tmp_path, 'x')
    assert entry['segments'][1] == {'id': 2, 'label': 2, 'name': 'c'} and len(entry['segments']) == 3
    assert np.array_equal(np.asarray(Image.open(tmp_path / entry['panoptic'])), IDS.numpy())


# ---------------------------------------------------------------------------------------------- boundaries


def boundary_metrics(truth, found, **options):
    metric = BoundaryMetric(num_classes=3, **options)
    metric.process({'images': [None], 'targets': [{'index': 0, 'mask': truth}]}, [{'mask': found}])
    return metric.evaluate(1)


def square(label=1, shift=0):
    mask = torch.zeros(40, 60, dtype=torch.int64)
    mask[10:30, 10 + shift : 30 + shift] = label
    return mask


def test_boundaries_shift_out_of_the_tolerance():
    metrics = boundary_metrics(square(), square(shift=2), tolerances=(1, 2, 3))
    assert metrics['boundary/F@1'] < metrics['boundary/F@2'] == metrics['boundary/F@3'] == 1.0
    one = boundary_metrics(square(), square(), tolerances=(1,))
    assert set(one.values()) == {1.0} and set(one) == {f'boundary/{n}@1' for n in ('F', 'precision', 'recall', 'F_any')}


def test_a_wrong_name_costs_the_class_and_not_the_outline():
    metrics = boundary_metrics(square(1), square(2), tolerances=(1,), classwise=True)
    assert metrics['boundary/F_any@1'] == 1.0 and metrics['boundary_F@1/0'] == 1.0
    assert metrics['boundary_F@1/1'] == metrics['boundary_F@1/2'] == 0.0
    assert metrics['boundary/F@1'] == pytest.approx(1 / 3)


def test_fractions_are_of_the_diagonal_and_agree_with_the_segmentation_metric():
    truth, found = square(), square(shift=3)
    found[:5] = 2
    truth[20:, :20] = 255
    ours = boundary_metrics(truth, found, tolerances=(0.0075, 0.05))
    metric = SegmentationMetric(num_classes=3)
    metric.process({'images': [None], 'targets': [{'index': 0, 'mask': truth}]}, [{'mask': found}])
    assert ours['boundary/F@0.0075'] == pytest.approx(metric.evaluate(1)['boundary_F'])
    assert ours['boundary/F@0.05'] == pytest.approx(boundary_metrics(truth, found, tolerances=(4,))['boundary/F@4'])


def test_the_border_of_what_is_unknown_is_no_outline():
    truth = torch.zeros(20, 20, dtype=torch.int64)
    truth[:10] = 255
    found = truth.clone()
    found[:10] = 1  # where nothing is known anything may be found
    assert set(boundary_metrics(truth, found, tolerances=(1,)).values()) == {0.0}
    truth[15:], found[15:] = 2, 2
    assert set(boundary_metrics(truth, found, tolerances=(1,)).values()) == {1.0}


def test_pictures_without_a_boundary():
    flat, unknown = torch.zeros(20, 20, dtype=torch.int64), torch.full((20, 20), 255)
    for truth in (flat, unknown):
        assert set(boundary_metrics(truth, flat, tolerances=(1,)).values()) == {0.0}


@pytest.mark.parametrize('tolerances', [(), (0,), (1.5,), (-1,)])
def test_wrong_tolerances(tolerances):
    with pytest.raises(ValueError, match='tolerances must be whole pixels from 1 or fractions of the diagonal below 1'):
        BoundaryMetric(tolerances=tolerances)
