"""Without these, mixed labels would not belong to the mixed pixels, or depend on the worker that mixed them."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from densezoo.data import CocoDetection, DataError, ImageFolder, MixCollate, RestartableSampler, collate

MIX = [dict(type=v2.MixUp, alpha=0.8, num_classes=3), dict(type=v2.CutMix, alpha=1.0, num_classes=3)]


@pytest.fixture
def flat(tmp_path, save):
    """Three classes of flat pictures: the shares of the colours in a mixed picture are its label."""
    for label, value in enumerate((0, 100, 200)):
        for number in range(4):
            save(f'train/{label}/{number}.png', pixels=np.full((32, 32, 3), value, dtype=np.uint8))
    return ImageFolder(root=tmp_path)


@pytest.mark.parametrize('mix', [MIX[0], MIX[1], MIX], ids=['mixup', 'cutmix', 'either'])
def test_labels_are_the_shares_of_the_pixels(flat, mix):
    mixed = 0
    for start in range(8):
        batch = collate([flat[(index * 5 % 12, start * 6 + index)] for index in range(6)], mix=mix)
        for image, target in zip(batch['images'], batch['targets'], strict=True):
            label = target['label']
            assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
            assert label.shape == (3,) and label.dtype == torch.float32 and float(label.sum()) == pytest.approx(1)
            assert float(image.float().mean()) == pytest.approx(float(label @ torch.tensor([0.0, 100, 200])), abs=0.6)
            mixed += int(label.max() < 0.99)
    assert mixed > 10


def test_mixing_depends_on_the_draw_alone(flat):
    samples = [flat[(index, index + 40)] for index in range(6)]
    mix = MixCollate(mix=MIX)
    first = mix(samples)
    torch.rand(3)
    again = MixCollate(mix=MIX)(samples)
    other = MixCollate(mix=MIX, seed=1)(samples)
    assert all(torch.equal(a, b) for a, b in zip(first['images'], again['images']))
    assert not all(torch.equal(a['label'], b['label']) for a, b in zip(first['targets'], other['targets']))


def test_probability_zero_gives_one_hot_labels(flat):
    batch = collate([flat[0], flat[5]], mix=MIX, probability=0.0)
    assert [target['label'].tolist() for target in batch['targets']] == [[1, 0, 0], [0, 1, 0]]


def test_what_cannot_be_mixed_is_named(flat, tmp_path, save, coco):
    save('train/0/0.png', height=20)
    with pytest.raises(DataError, match=r'images of one size, got \[\(3, 20, 80\), \(3, 32, 32\)\]'):
        collate([flat[0], flat[1]], mix=MIX)
    few = dict(type=v2.MixUp, num_classes=2)
    with pytest.raises(DataError, match=r'label 2 of .*2/0\.png is not below num_classes=2 of mix'):
        collate([flat[8], flat[1]], mix=few)
    with pytest.raises(ValueError, match='every transform needs the same num_classes'):
        MixCollate(mix=[few, MIX[0]])
    detection = CocoDetection(root=coco([dict()]))
    with pytest.raises(DataError, match='need classification samples with an integer label'):
        collate([detection[0]], mix=MIX)


@pytest.mark.parametrize('masks', [False, True])
def test_batches_arrive_from_workers_unchanged(coco, masks):
    root = coco([dict(), dict(row=20), dict(image_id=101)], images=3)
    dataset = CocoDetection(root=root, masks=masks, keep_empty=True, transforms=[dict(type=v2.RandomHorizontalFlip)])

    def batches(workers):
        loader = DataLoader(
            dataset, batch_size=4, num_workers=workers, sampler=RestartableSampler(dataset), collate_fn=partial(collate)
        )
        iterator = iter(loader)
        return [next(iterator) for _ in range(4)]

    for here, there in zip(batches(0), batches(2), strict=True):
        assert here.keys() == there.keys() == {'images', 'targets'}
        for a, b in zip(here['images'], there['images'], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        for left, right in zip(here['targets'], there['targets'], strict=True):
            assert left.keys() == right.keys()
            for key, value in left.items():
                if isinstance(value, torch.Tensor):
                    assert type(right[key]) is torch.Tensor and right[key].dtype == value.dtype
                    assert right[key].shape == value.shape and torch.equal(right[key], value)
                else:
                    assert type(right[key]) is type(value) and right[key] == value


def test_a_batch_is_an_ordinary_dict_that_keeps_layouts():
    photograph = torch.arange(24, dtype=torch.uint8).reshape(4, 2, 3).permute(2, 0, 1)
    batch = collate([{'image': photograph, 'target': {'label': 1, 'soft': torch.ones(2, dtype=torch.float64)[::2]}}])
    assert isinstance(batch, dict)
    for other in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), copy.copy(batch)):
        assert torch.equal(other['images'][0], photograph) and other['images'][0].stride() == photograph.stride()
        assert other['targets'][0]['soft'].tolist() == [1.0] and other['targets'][0]['label'] == 1
    assert copy.copy(batch)['images'] is batch['images']


def test_large_tensors_share_one_storage_and_small_ones_do_not():
    samples = [{'image': torch.zeros(3, 200, 200), 'target': {'boxes': torch.zeros(3, 4)}} for _ in range(2)]
    batch = pickle.loads(pickle.dumps(collate(samples)))
    first, second = batch['images']
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert batch['targets'][0]['boxes'].untyped_storage().nbytes() == 48
