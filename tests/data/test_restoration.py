"""Without these, a pair could be misaligned, and a validation photograph be degraded differently each time."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from densezoo.data import CleanFolder, DataError, GaussianNoise, PairedFolder, RandomCrop


@pytest.fixture(params=['{split}/{kind}', '{kind}/{split}'])
def pairs(request, tmp_path, save, photograph):
    for number in range(3):
        pixels = photograph[number * 10 : number * 10 + 60, :80]
        save(request.param.format(split='train', kind='target') + f'/{number}.png', pixels=pixels)
        save(request.param.format(split='train', kind='input') + f'/{number}.png', pixels=255 - pixels)
    return tmp_path


def test_pairs_stay_aligned(pairs):
    transforms = [dict(type=v2.RandomHorizontalFlip), dict(type=v2.RandomVerticalFlip), dict(type=RandomCrop, size=32)]
    dataset = PairedFolder(root=pairs, transforms=transforms)
    assert len(dataset) == 3
    for draw in range(12):
        sample = dataset[(draw % 3, draw)]
        image, clean = sample['image'], sample['target']['clean']
        assert image.dtype == clean.dtype == torch.float32 and image.shape == clean.shape == (3, 32, 32)
        torch.testing.assert_close(image, 1 - clean)
        assert clean.std() > 0.01 and sample['target']['original_size'] == (60, 80)


def test_a_pair_of_two_sizes_is_named(pairs, save):
    path = next(pairs.rglob('input/**/1.png'))
    save(str(path.relative_to(pairs)), height=58)
    dataset = PairedFolder(root=pairs)
    for look in (dataset.check, lambda: dataset[1]):
        with pytest.raises(DataError, match=r'1\.png: target of another size: the picture is 80x58, .*1\.png is 80x60'):
            look()


def test_lonely_pictures_are_named(pairs):
    next(pairs.rglob('input/**/1.png')).unlink()
    next(pairs.rglob('target/**/2.png')).unlink()
    with pytest.raises(DataError, match=r'2 problems: .*2\.png: has no target 2\.\* in .*1\.png: has no input of this'):
        PairedFolder(root=pairs)
    with pytest.warns(UserWarning, match='2 problems'):
        assert len(PairedFolder(root=pairs, on_error='skip')) == 1


def test_16_bits_are_kept(tmp_path):
    deep = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    for kind in ('input', 'target'):
        (tmp_path / kind / 'train').mkdir(parents=True)
        Image.fromarray(deep).save(tmp_path / kind / 'train/a.png')
    clean = PairedFolder(root=tmp_path, transforms=[dict(type=v2.RandomHorizontalFlip, p=1.0)])[0]['target']['clean']
    assert np.abs(clean[0].numpy() - deep[:, ::-1] / 65535).max() < 1e-6


def test_degradation_is_drawn_anew_in_training_and_fixed_in_evaluation(tmp_path, save):
    save('train/a.png')
    save('train/sub/b.png')
    dataset = CleanFolder(root=tmp_path, degrade=dict(type=GaussianNoise, sigma=25, clip=False))
    sample = dataset[0]
    noise = sample['image'] - sample['target']['clean']
    assert noise.std() * 255 == pytest.approx(25, rel=0.05) and abs(noise.mean()) < 0.01
    assert torch.equal(dataset[0]['image'], sample['image'])
    assert not torch.equal(dataset[(0, 5)]['image'], sample['image'])
    assert torch.equal(dataset[(0, 5)]['target']['clean'], sample['target']['clean'])
    assert not torch.allclose(dataset[1]['image'] - dataset[1]['target']['clean'], noise)


def test_wrong_degradations_are_named(tmp_path, save):
    save('train/a.png')
    with pytest.raises(TypeError, match='degrade must be a callable or dict'):
        CleanFolder(root=tmp_path, degrade=3)
    with pytest.raises(TypeError, match=r"degrade: GaussianNoise has no argument 'sigm', .*nearest: 'sigma'"):
        CleanFolder(root=tmp_path, degrade=dict(type=GaussianNoise, sigm=3))
    with pytest.raises(DataError, match=r'degrade must keep the shape, got \(3, 30, 80\) from \(3, 60, 80\)'):
        CleanFolder(root=tmp_path, degrade=lambda image: image[:, ::2])[0]
