"""Without this what is exported could differ from what was validated: each task, exported form against predictions."""

import json
from functools import partial

import pytest
import tiny_tasks as tasks
import torch
from torchvision.ops import batched_nms

from densezoo.deploy import OnnxModel, build_engine, export_onnx, match_boxes
from densezoo.deploy.onnx import count_operators
from densezoo.heads.universal import Reader
from densezoo.train.deployable import Deployable, metadata

SIZE = (64, 96)


def pixels(batch=2):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=generator) for _ in range(batch)]


def ready(make, **options):
    torch.manual_seed(0)
    task = make().eval()
    return task, Deployable(task, **options).eval()


def predictions(task, images):
    targets = [{'file': '', 'image_id': i, 'index': i, 'size': SIZE, 'original_size': SIZE} for i in range(len(images))]
    data = task.data_preprocessor({'images': images, 'targets': targets})
    with torch.no_grad():
        return task(**data, mode='predict')


@torch.no_grad()
@pytest.mark.parametrize('make', [tasks.classifier, tasks.own_classifier])
def test_classification(make):
    task, model = ready(make)
    images = pixels()
    logits = model(torch.stack(images).float())
    assert model.outputs == ('logits',) and logits.shape == (2, 5)
    for row, result in zip(logits, predictions(task, images), strict=True):
        torch.testing.assert_close(row.softmax(0), result['scores'])


@torch.no_grad()
def test_segmentation():
    task, model = ready(tasks.segmentor)
    images = pixels()
    x = torch.stack(images).float()
    mask = model(x)
    assert model.outputs == ('mask',) and mask.dtype == torch.int32
    expected = torch.stack([result['mask'] for result in predictions(task, images)])
    assert torch.equal(mask.long(), expected) and len(mask.unique()) > 1
    logits = ready(tasks.segmentor, form='logits')[1](x)
    assert logits.shape == (2, 4, *SIZE) and torch.equal(logits.argmax(1), expected)


@torch.no_grad()
def test_detection_after_nms_is_the_prediction():
    task, model = ready(tasks.detector)
    task.head.score_threshold = 0.0
    images = pixels()
    boxes, scores, labels = model(torch.stack(images).float())
    assert model.outputs == ('boxes', 'scores', 'labels') and labels.dtype == torch.int32
    assert boxes.shape == (*scores.shape, 4) and boxes.min() >= 0 and boxes[..., 2].max() <= SIZE[1]
    for i, result in enumerate(predictions(task, images)):
        large = ((boxes[i, :, 2:] - boxes[i, :, :2]) > task.head.min_size).all(1)
        candidate, score, label = boxes[i][large], scores[i][large], labels[i][large].long()
        keep = batched_nms(candidate, score, label, task.head.nms_threshold)[: task.head.detections]
        torch.testing.assert_close(candidate[keep], result['boxes'])
        torch.testing.assert_close(score[keep], result['scores'])
        assert len(keep) > 1 and torch.equal(label[keep], result['labels'])


@torch.no_grad()
def test_restoration():
    task, model = ready(tasks.restorer)
    images = pixels()
    restored = model(torch.stack(images) / 255)
    assert model.outputs == ('restored',)
    for ours, result in zip(restored, predictions(task, images), strict=True):
        torch.testing.assert_close(ours, result['image'].clamp(0, 1), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('make', [tasks.universal, tasks.oneformer, tasks.kmax])
def test_universal_logits_and_metadata_make_the_predictions(make):
    task, model = ready(make)
    images = pixels()
    classes, masks = model(torch.stack(images).float())
    assert model.outputs == ('classes', 'masks') and classes.shape[:-2] == masks.shape[:-3]
    decoding = json.loads(json.dumps(metadata(task)['decoding']))  # as a file carries it
    results = Reader(**decoding).results(classes, masks, [SIZE] * 2, [SIZE] * 2)
    for result, expected in zip(results, predictions(task, images), strict=True):
        assert result.keys() == expected.keys() and len(expected['scores']) > 1
        for name, value in result.items():
            torch.testing.assert_close(value, expected[name], msg=name)


@torch.no_grad()
@pytest.mark.parametrize('make', [tasks.detector, tasks.two_stages])
@pytest.mark.parametrize('nms', ['operator', 'products'])
def test_suppression_inside_gives_the_predictions(make, nms):
    task, model = ready(make, nms=nms)
    if make is tasks.detector:
        task.head.score_threshold = 0.0
    images = pixels()
    boxes, scores, labels = model(torch.stack(images).float())
    for i, result in enumerate(predictions(task, images)):
        count = min(len(result['boxes']), 30)
        assert count > 1
        torch.testing.assert_close(scores[i, :count], result['scores'][:count], rtol=0, atol=1e-5)
        torch.testing.assert_close(boxes[i, :count], result['boxes'][:count], rtol=0, atol=0.01)
        assert torch.equal(labels[i, :count].long(), result['labels'][:count])


@pytest.mark.parametrize(('nms', 'count'), [('operator', 3), (None, 0)])
def test_two_stages_with_masks_become_onnx(nms, count, tmp_path):
    """One NonMaxSuppression for each of two levels of proposals and one for the results; none where products do it."""
    task, model = ready(partial(tasks.two_stages, masks=True), nms=nms)
    x = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 255
    path = export_onnx(model, x, tmp_path / 'task.onnx', outputs=model.outputs, metadata=metadata(task, nms=nms))
    assert count_operators(path).get('NonMaxSuppression', 0) == count
    x = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        ours, expected = OnnxModel(path)(x), model(x)
    assert model.outputs == ('boxes', 'scores', 'labels', 'masks') and ours[3].shape == (3, 100, 28, 28)
    found = match_boxes(ours, expected)
    assert found.boxes > 10 and found.matched == found.boxes and found.pixels < 0.05 and found.score < 1e-4
    if nms is None:
        build_engine(path, tmp_path / 'task.engine')


def test_metadata_and_errors():
    task, _ = ready(tasks.segmentor)
    assert metadata(task, {'classes': ('a', 'b')}) == {
        'task': 'Segmentor',
        'channels': 'RGB',
        'range': '0..255',
        'normalised': 'inside',
        'classes': ['a', 'b'],
        'divisor': 32,
        'padding': [120.0, 115.0, 105.0],
    }
    assert metadata(tasks.restorer())['range'] == '0..1'
    with pytest.raises(ValueError, match=r"form must be one of mask, logits, got form='masks'"):
        Deployable(task, form='masks')
    with pytest.raises(ValueError, match=r"nms must be None or one of operator, products, got nms='fast'"):
        Deployable(tasks.detector(), nms='fast')
    with pytest.raises(ValueError, match='nms is for detection, Segmentor has no boxes'):
        Deployable(task, nms='operator')
    found = metadata(tasks.detector())
    assert found['nms'] == 'outside' and found['decoding']['limit'] == 100 and found['divisor'] == 32
    assert metadata(tasks.two_stages(masks=True))['nms'] == 'products'
