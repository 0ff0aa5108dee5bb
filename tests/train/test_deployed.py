"""Without this a deployed model could be fed other pixels than the trained one, or its answers be read wrongly.

The exported file is played by the module that is exported, so that no export is waited for."""

from functools import partial
from pathlib import Path

import pytest
import tiny_tasks as tasks
import torch

from densezoo.train.deployable import Deployable, metadata
from densezoo.train.deployed import DeployedTask

SIZE = (64, 96)


class File:
    """What OnnxModel and Engine look like: takes the images that `smallest` and `largest` allow, and no others."""

    path, device = Path('tiny.onnx'), 'cpu'

    def __init__(self, task, smallest=(1, 3, *SIZE), largest=(None, 3, *SIZE), **options):
        self.model = Deployable(task, **options).eval()
        self.metadata = metadata(task, {'classes': list('abcde')}, options.get('nms'))
        self.shapes, self.calls = (smallest, largest), []

    def __call__(self, images):
        for n, low, high in zip(images.shape, *self.shapes, strict=True):
            assert (low is None or n >= low) and (high is None or n <= high), tuple(images.shape)
        self.calls.append(tuple(images.shape))
        out = self.model(images)
        return list(out) if isinstance(out, tuple) else out


def made(make):
    torch.manual_seed(0)
    task = make().eval()
    if hasattr(task.head, 'score_threshold'):
        task.head.score_threshold = 0.0
    return task


def samples(*sizes, scaled=False):
    generator = torch.Generator().manual_seed(5)
    out = []
    for i, size in enumerate(sizes):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        target = {'file': '', 'image_id': i, 'index': i, 'size': size, 'original_size': size}
        out.append({'image': image / 255 if scaled else image, 'target': target})
    return out


def predictions(task, batch):
    data = {'images': [s['image'] for s in batch], 'targets': [s['target'] for s in batch]}
    with torch.no_grad():
        return task(**task.data_preprocessor(data), mode='predict')


def agree(ours, expected, limit=30):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.keys() == b.keys()
        if 'panoptic' in b:
            for name in b:
                torch.testing.assert_close(a[name], b[name], msg=name)
            assert len(b['scores']) > 1 and a['panoptic'].dtype == torch.int64
        elif 'boxes' in b:
            count = min(len(b['boxes']), limit)
            assert count > 1
            torch.testing.assert_close(a['boxes'][:count], b['boxes'][:count], rtol=0, atol=0.02)
            torch.testing.assert_close(a['scores'][:count], b['scores'][:count], rtol=0, atol=1e-4)
            assert torch.equal(a['labels'][:count], b['labels'][:count])
            if 'masks' in b:
                assert a['masks'].dtype == torch.bool and a['masks'].shape[1:] == b['masks'].shape[1:]
                assert (a['masks'][:count] == b['masks'][:count]).float().mean() > 0.999
        elif 'mask' in b:
            assert a['mask'].dtype == torch.int64 and (a['mask'] == b['mask']).float().mean() > 0.999
        elif 'image' in b:
            torch.testing.assert_close(a['image'], b['image'].clamp(0, 1), rtol=0, atol=1e-5)
        else:
            assert a['label'] == b['label']
            torch.testing.assert_close(a['scores'], b['scores'])


@pytest.mark.parametrize(
    ('make', 'options'),
    [
        (tasks.classifier, {}),
        (tasks.segmentor, {}),
        (tasks.segmentor, {'form': 'logits'}),
        (tasks.detector, {}),
        (tasks.detector, {'nms': 'products'}),
        (tasks.two_stages, {}),
        (partial(tasks.two_stages, masks=True), {'nms': 'operator'}),
        (tasks.rtdetr, {}),
        (tasks.rtdetr, {'nms': 'operator'}),
        (tasks.restorer, {}),
        (tasks.universal, {}),
        (tasks.oneformer, {}),
        (tasks.kmax, {}),
    ],
    ids=[
        'classes',
        'mask',
        'logits',
        'candidates',
        'results',
        'two stages',
        'masks',
        'end to end',
        'nothing to suppress',
        'restored',
        'universal',
        'oneformer',
        'kmax',
    ],
)
def test_results_are_the_trained_task_s(make, options):
    task = made(make)
    batch = samples(SIZE, SIZE, SIZE, scaled=make is tasks.restorer)
    agree(DeployedTask(File(task, **options))(batch), predictions(task, batch))


@pytest.mark.parametrize('make', [tasks.segmentor, tasks.detector, tasks.rtdetr, tasks.restorer])
def test_smaller_pictures_are_padded_as_in_training(make):
    task = made(make)
    batch = samples((50, 90), SIZE, scaled=make is tasks.restorer)
    ours = DeployedTask(File(task))(batch)
    if 'boxes' in ours[0]:  # candidates that touch the padding are dropped by another rule: see detection.finish
        assert ours[0]['boxes'][:, 2].max() <= 90 and ours[0]['boxes'][:, 3].max() <= 50
        ours, batch = ours[1:], batch[1:]
        agree(ours, predictions(task, batch))
    else:
        agree(ours, predictions(task, batch))


def test_larger_pictures_are_scaled_and_results_scaled_back():
    task = made(tasks.detector)
    (batch,) = samples((128, 128))
    (found,) = DeployedTask(File(task))([batch])
    assert 96 < found['boxes'].max() <= 128
    (mask,) = DeployedTask(File(made(tasks.segmentor)))([batch])
    assert mask['mask'].shape == (128, 128)
    assert DeployedTask(File(made(tasks.classifier)))([batch])[0]['scores'].shape == (5,)
    restorer = DeployedTask(File(made(tasks.restorer)))
    with pytest.raises(ValueError, match=r'tiny\.onnx takes pictures of at most 64x96, got 128x128; export with'):
        restorer([batch])


def test_sizes_and_batches_of_the_file():
    task = made(tasks.segmentor)
    batch = samples(SIZE, SIZE, SIZE)
    expected = predictions(task, batch)
    fixed = File(task, smallest=(2, 3, *SIZE), largest=(2, 3, *SIZE))
    agree(DeployedTask(fixed)(batch), expected)
    assert [shape[0] for shape in fixed.calls] == [2, 2]
    free = File(task, smallest=(1, 3, 33, 33), largest=(None, 3, None, None))
    agree(DeployedTask(free)(samples((20, 70), SIZE)), predictions(task, samples((20, 70), SIZE)))
    assert free.calls == [(2, 3, 64, 96)]  # 20 rows are fewer than the file takes, 64 the next multiple of 32


def test_a_backbone_alone_is_no_task():
    file = File(made(tasks.classifier))
    file.metadata = {'layout': 'NCHW'}
    with pytest.raises(ValueError, match=r'tiny\.onnx holds no task; `densezoo export CONFIG CHECKPOINT` writes one'):
        DeployedTask(file)
