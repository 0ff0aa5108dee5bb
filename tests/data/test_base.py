"""Without these, a sample would depend on the worker that made it, and one bad file would end a long run."""

import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from densezoo.data import DataError, ImageFolder, RestartableSampler, collate
from densezoo.data.base import seeded

AUGMENTED = [dict(type=v2.RandomAffine, degrees=20), dict(type=v2.ColorJitter, brightness=0.5)]


class Noisy:
    """Draws from all three generators that third-party transforms use."""

    def __call__(self, sample):
        value = int(torch.randint(0, 50, ())) + int(np.random.randint(50)) + random.randrange(50)
        return sample | {'image': (sample['image'] // 2 + value).to(torch.uint8)}


@pytest.fixture
def folder(tmp_path, save):
    for split in ('train', 'val'):
        for name in 'ab':
            for number in range(4):
                save(f'{split}/{name}/{number}.png', height=30 + number, width=40)
    return tmp_path


def test_a_sample_depends_on_index_and_draw_alone(folder):
    dataset = ImageFolder(root=folder, transforms=[*AUGMENTED, Noisy()])
    first = dataset[(3, 17)]['image']
    torch.rand(5)
    np.random.rand(5)
    random.random()
    assert torch.equal(first, dataset[(3, 17)]['image'])
    assert not torch.equal(first, dataset[(3, 18)]['image'])
    assert torch.equal(dataset[3]['image'], dataset[(3, 3)]['image'])
    assert not torch.equal(first, ImageFolder(root=folder, seed=1, transforms=[*AUGMENTED, Noisy()])[(3, 17)]['image'])


def test_reading_a_sample_leaves_the_generators_alone(folder):
    dataset = ImageFolder(root=folder, transforms=[Noisy()])
    draws = []
    for read in (False, True):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if read:
            dataset[(1, 9)]
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert draws[0] == draws[1]


def test_generators_come_back_after_an_error():
    random.seed(5)
    expected = random.Random(5).random()
    with pytest.raises(KeyError), seeded(1, 2):
        raise KeyError
    assert random.random() == expected


@pytest.mark.parametrize('workers', [1, 2])
def test_samples_are_equal_whatever_the_number_of_workers(folder, workers):
    def batches(count):
        dataset = ImageFolder(root=folder, transforms=[*AUGMENTED, Noisy()])
        loader = DataLoader(
            dataset, batch_size=3, sampler=RestartableSampler(dataset), num_workers=count, collate_fn=collate
        )
        iterator = iter(loader)
        return [next(iterator) for _ in range(5)]

    alone, together = batches(0), batches(workers)
    assert len(alone) == len(together) == 5
    for left, right in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(left['images'], right['images'], strict=True))
        assert left['targets'] == right['targets']


def test_the_target_names_the_picture(folder):
    dataset = ImageFolder(root=folder, transforms=[dict(type=v2.Resize, size=(16, 24))])
    target = dataset[(5, 42)]['target']
    assert target == {
        'label': 1,
        'file': str(folder / 'train/b/1.png'),
        'image_id': 5,
        'index': 5,
        'draw': 42,
        'size': (16, 24),
        'original_size': (31, 40),
    }
    assert dataset.aspect_ratios() == pytest.approx([(30 + number) / 40 for number in range(4)] * 2)


def test_bad_files_are_listed_by_check(folder):
    (folder / 'train/a/1.png').write_bytes((folder / 'train/a/1.png').read_bytes()[:200])
    (folder / 'train/b/2.png').write_text('no picture')
    dataset = ImageFolder(root=folder)
    with pytest.raises(DataError, match=r"2 problems: .*a/1\.png: trunc.*b/2\.png: is not an image.*on_error='skip'"):
        dataset.check()
    dataset = ImageFolder(root=folder, on_error='skip')
    with pytest.warns(UserWarning, match='2 problems: .*They are left out'):
        problems = dataset.check()
    assert [(file.rsplit('/', 2)[1:], reason[:9]) for file, reason in problems] == [
        (['a', '1.png'], 'truncated'),
        (['b', '2.png'], 'is not an'),
    ]
    assert len(dataset) == 6
    assert [dataset[index]['target']['file'][-7:] for index in (0, 1)] == ['a/0.png', 'a/2.png']
    assert dataset.check() == []


def test_check_can_decode_everything(folder):
    path = folder / 'train/a/1.png'
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF  # inside the pixels; header and end are whole
    path.write_bytes(data)
    dataset = ImageFolder(root=folder)
    assert dataset.check() == []
    with pytest.raises(DataError, match=r'1 problem: .*a/1\.png: '):
        dataset.check(decode=True)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_that_fails_while_training_is_replaced_and_counted(folder, workers):
    dataset = ImageFolder(root=folder, on_error='skip')
    for number in (1, 2):
        (folder / f'train/a/{number}.png').unlink()
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        targets = [target for batch in loader for target in batch['targets']]
    assert [target['index'] for target in targets] == [0, 3, 3, 3, 4, 5, 6, 7]
    assert dataset.skipped == 3  # index 1 passed over two bad files, index 2 over one
    if workers == 0:
        assert 'no such file; replaced by the next good one (1 so far)' in str(caught[0].message)


def test_when_no_file_is_good_skipping_ends(folder):
    dataset = ImageFolder(root=folder, on_error='skip')
    for path in (folder / 'train').rglob('*.png'):
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(DataError, match='not one of 8 files can be used'):
        dataset[0]


def test_a_worker_raises_one_line_and_no_trace(folder):
    dataset = ImageFolder(root=folder)
    (folder / 'train/a/0.png').write_bytes(b'')
    with pytest.raises(DataError) as caught:
        next(iter(DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate)))
    assert str(caught.value) == f'{folder}/train/a/0.png: empty file (0 bytes)'


@pytest.mark.parametrize('workers', [0, 1])
def test_a_failing_transform_is_named_with_its_file(folder, workers):
    dataset = ImageFolder(root=folder, transforms=[dict(type=v2.RandomCrop, size=(500, 500))], on_error='skip')
    advice = r' \(num_workers=0 shows where\)' if workers else ''
    message = rf'a/0\.png: transform RandomCrop failed: ValueError: .*500.*{advice}$'
    with pytest.raises(DataError, match=message) as caught:
        next(iter(DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate)))
    assert '\n' not in str(caught.value)


def test_data_errors_and_datasets_survive_pickling(folder):
    error = pickle.loads(pickle.dumps(DataError('a.png: gone')))
    assert isinstance(error, ValueError) and str(error) == 'a.png: gone'
    dataset = ImageFolder(root=folder, transforms=AUGMENTED)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[(1, 2)]['image'], dataset[(1, 2)]['image'])


def test_an_empty_dataset_and_a_missing_root_are_named(tmp_path, folder, monkeypatch):
    (tmp_path / 'void/train').mkdir(parents=True)
    with pytest.raises(DataError, match='holds no class folders'):
        ImageFolder(root=tmp_path / 'void')
    with pytest.raises(DataError, match="root='/does/not/exist' is not a folder"):
        ImageFolder(root='/does/not/exist')
    with pytest.raises(DataError, match="split: no folder 'test' in root="):
        ImageFolder(root=folder, split='test')
    with pytest.raises(DataError, match='names an environment variable that is not set'):
        ImageFolder(root='$NOT_A_VARIABLE/x')
    monkeypatch.setenv('SOMEWHERE', str(folder))
    assert len(ImageFolder(root='$SOMEWHERE')) == 8
    monkeypatch.setenv('DENSEZOO_DATA', str(folder.parent))
    assert len(ImageFolder(root=f'$DENSEZOO_DATA/{folder.name}')) == 8
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got on_error='ignore'"):
        ImageFolder(root=folder, on_error='ignore')


def test_class_folders_fix_the_labels(folder, save):
    for path in sorted((folder / 'val/a').iterdir()):
        path.unlink()
    (folder / 'val/a').rmdir()
    dataset = ImageFolder(root=folder, split='val')
    assert dataset.metainfo['classes'] == ('a', 'b') and dataset[0]['target']['label'] == 1
    assert len(dataset.metainfo['palette']) == 2
    assert [ImageFolder(root=folder, classes=('b', 'a'))[index]['target']['label'] for index in (0, 4)] == [0, 1]
    save('val/bb/0.png')
    with pytest.raises(DataError, match=r"val/bb: is not a class of .*train \(nearest: 'b'\)"):
        ImageFolder(root=folder, split='val')
    with pytest.raises(DataError, match=r"train/bx: named in classes, but there is no such folder \(nearest: 'b'\)"):
        ImageFolder(root=folder, classes=('a', 'bx'))
