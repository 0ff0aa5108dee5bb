"""The five tasks on real parts: losses, results, plain tensors; and the batch that they are given."""

from typing import Any

import pytest
import torch
from tiny_tasks import SMALL, TASKS, classifier, segmentor
from torch import Tensor, nn

from densezoo.backbones import create_model
from densezoo.heads import LinearClassifier
from densezoo.train import ImageClassifier, Preprocess, Restorer, Task

SIZES = [(40, 64), (33, 50)]


def batch(task: Task) -> dict[str, Any]:
    images, targets = [], []
    for index, (height, width) in enumerate(SIZES):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        target: dict[str, Any] = {'file': f'{index}.png', 'image_id': index, 'index': index, 'size': (height, width)}
        target |= {'original_size': (2 * height, 2 * width), 'label': index}
        target |= {'boxes': torch.tensor([[4.0, 6.0, 30.0, 28.0]]), 'labels': torch.tensor([index])}
        target |= {'masks': torch.zeros(1, height, width, dtype=torch.bool)}
        target['masks'][0, 6:28, 4:30] = True
        target |= {'mask': torch.randint(0, 4, (height, width)), 'clean': 1 - image / 255}
        images.append(image / 255 if isinstance(task, Restorer) else image)
        targets.append(target)
    return {'images': images, 'targets': targets}


@pytest.mark.parametrize('build', TASKS)
def test_every_task_learns_predicts_and_exports(build: Any) -> None:
    torch.manual_seed(0)
    task = build()
    data = batch(task)
    inputs = task.data_preprocessor(data, True)
    total, logged = task.parse_losses(task(**inputs, mode='loss'))
    total.backward()
    assert total.ndim == 0 and torch.isfinite(total) and 'loss' in logged and not logged['loss'].requires_grad
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.parameters())

    task.eval()
    with torch.no_grad():
        results = task.val_step(data)
        plain = task(inputs['images'])
    assert len(results) == 2
    for result, (height, width) in zip(results, SIZES, strict=True):
        if 'mask' in result:  # in the picture's original coordinates
            assert result['mask'].shape == (2 * height, 2 * width)
        elif 'image' in result:  # as large as the dataset's image, to be compared with `clean`
            assert result['image'].shape == (3, height, width)
        elif 'boxes' in result:
            limits = torch.tensor([2 * width, 2 * height] * 2)
            assert (result['boxes'] >= 0).all() and (result['boxes'] <= limits).all()
        else:
            assert result['scores'].shape == (5,) and 0 <= result['label'] < 5
    for tensor in plain if isinstance(plain, list | tuple) else [plain]:
        assert all(isinstance(part, Tensor) for part in (tensor if isinstance(tensor, list | tuple) else [tensor]))


def test_padding_does_not_reach_a_picture_result() -> None:
    """A picture alone and the same picture padded in a batch give the same class map inside (no attention here)."""
    torch.manual_seed(0)
    task = segmentor().eval()
    data = batch(task)
    data['images'][1] = data['images'][0][:, :32, :32]
    data['targets'][1] |= {'size': (32, 32), 'original_size': (32, 32)}
    alone = {'images': data['images'][:1], 'targets': data['targets'][:1]}
    with torch.no_grad():
        together, single = task.val_step(data)[0], task.val_step(alone)[0]
    assert torch.equal(together['mask'], single['mask'])


def test_batch_is_normalised_then_padded_with_zeros() -> None:
    preprocess = Preprocess(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0), divisor=32)
    images = [torch.full((3, 40, 64), 50, dtype=torch.uint8), torch.full((3, 33, 50), 50, dtype=torch.uint8)]
    out = preprocess.batch(images)
    assert out.shape == (2, 3, 64, 64) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out[1, :, 32, 49].tolist() == [20.0, 7.5, 4.0] and out[0, :, 39, 63].tolist() == [20.0, 7.5, 4.0]
    assert out[1, :, 33:].abs().sum() == 0 and out[1, :, :, 50:].abs().sum() == 0 and out[0, :, 40:].abs().sum() == 0
    # Pictures that fill the batch take a shorter way to the same values.
    full = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    mixed = preprocess.batch([full, full[:, :20]])
    assert torch.equal(preprocess.batch([full, full])[0], mixed[0])


def test_restoration_images_stay_as_they_are() -> None:
    image = torch.rand(3, 7, 9)
    assert torch.equal(Preprocess().batch([image])[0], image)
    assert torch.equal(Preprocess().batch([torch.full((3, 4, 4), 255, dtype=torch.uint8)])[0], torch.ones(3, 4, 4))


def test_wrong_preprocessing_is_named() -> None:
    for arguments, message in (
        ({'mean': (1.0,)}, 'mean and std must both be given'),
        ({'mean': (1.0,), 'std': (1.0, 2.0)}, 'the same length'),
        ({'mean': (1.0,), 'std': (0.0,)}, 'std must be positive'),
        ({'divisor': 0}, 'divisor must be at least 1'),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocess(**arguments)


def test_wrong_tasks_are_named() -> None:
    backbone = {'type': create_model, 'num_classes': 5, **SMALL}
    with pytest.raises(ValueError, match='mode must be one of'):
        classifier()(torch.zeros(1, 3, 32, 32), mode='train')
    with pytest.raises(ValueError, match=r'LinearClassifier needs a feature pyramid.*features_only=True'):
        ImageClassifier(backbone=backbone, head={'type': LinearClassifier, 'num_classes': 5})

    class Silent(nn.Module):
        pass

    task = ImageClassifier(backbone=nn.Identity(), head=Silent())
    with pytest.raises(ValueError, match=r'Silent.loss returned no term called loss_\*'):
        task.parse_losses({'accuracy': torch.zeros(())})


def test_loss_is_the_sum_of_its_terms_only() -> None:
    task = classifier()
    total, logged = task.parse_losses(
        {
            'loss_a': torch.tensor(1.0),
            'loss_b': torch.tensor(2.5),
            'top1': torch.tensor(9.0),
            'my_loss': torch.tensor(7.0),
        }
    )
    assert total == 3.5 and list(logged) == ['loss', 'loss_a', 'loss_b', 'top1', 'my_loss']


def test_mmengine_does_not_initialise_again() -> None:
    task = classifier()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
