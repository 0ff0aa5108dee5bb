"""Without these, holes could miss their share, the mask disagree with the picture, or pairs of sizes be misaligned."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from densezoo.data import CleanFolder, DataError, Degrade, Downscale, GaussianNoise, Holes, RandomDegrade, read_alpha


@pytest.mark.parametrize('size', [(3, 64, 48), (1, 9, 200), (3, 1, 1)])
@pytest.mark.parametrize('boxes', [0.0, 0.5, 1.0])
def test_holes_and_mask_agree(size, boxes):
    image = torch.rand(size) * 0.5 + 0.25
    before = image.clone()
    torch.manual_seed(3)
    holed = Holes(share=(0.2, 0.6), boxes=boxes, fill=0.1)(image)
    known = holed[-1:]
    assert holed.shape == (size[0] + 1, *size[1:]) and set(known.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(holed[:-1], torch.where(known > 0, image, torch.tensor(0.1))) and torch.equal(image, before)
    torch.manual_seed(3)
    assert torch.equal(Holes(share=(0.2, 0.6), boxes=boxes, fill=0.1)(image), holed)


def test_share():
    torch.manual_seed(0)
    shares = torch.tensor([float(1 - Holes(share=(0.2, 0.6)).draw(96, 96).mean()) for _ in range(40)])
    assert shares.min() > 0.15 and shares.max() < 0.65 and shares.std() > 0.05
    assert Holes(share=1.0).draw(20, 30).sum() == 0 and Holes(share=0.0).draw(20, 30).mean() == 1


def test_downscale_cuts_what_is_left_over(tmp_path, save):
    image = torch.rand(3, 23, 18)
    for factor in (2, 4):
        small = Downscale(factor=factor)(image)
        cut = image[None, :, : 23 // factor * factor, : 18 // factor * factor]
        wanted = F.interpolate(cut, size=small.shape[1:], mode='bicubic', antialias=True)[0].clamp(0, 1)
        torch.testing.assert_close(small, wanted)
    steps = Degrade(steps=[Downscale(factor=2), GaussianNoise(), Downscale(factor=2)])
    assert steps.scale == 4 and steps(image).shape == (3, 5, 4)
    save('train/a.png')  # 60 x 80
    sample = CleanFolder(root=tmp_path, degrade=dict(type=Downscale, factor=7))[0]
    assert sample['image'].shape == (3, 8, 11) and sample['target']['clean'].shape == (3, 56, 77)
    assert sample['target']['size'] == (8, 11)
    holed = CleanFolder(root=tmp_path, degrade=dict(type=Holes))[0]
    assert holed['image'].shape == (4, 60, 80) and holed['target']['clean'].shape == (3, 60, 80)


def test_alpha_says_where_a_picture_is_known(tmp_path):
    pixels = np.full((5, 6, 4), 200, dtype=np.uint8)
    pixels[1:3, 2:4, 3] = 10
    Image.fromarray(pixels).save(tmp_path / 'holes.png')
    known = read_alpha(tmp_path / 'holes.png')
    assert known.shape == (1, 5, 6) and known.dtype == torch.uint8
    assert torch.equal(known[0] == 0, torch.from_numpy(pixels[..., 3] == 10)) and known.max() == 255
    Image.fromarray(pixels[..., :3]).save(tmp_path / 'whole.png')
    with pytest.raises(DataError, match=r'whole\.png: has no transparency; holes .* must be transparent'):
        read_alpha(tmp_path / 'whole.png')


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Holes(share=1.5), r'share must be a number or a range .* within 0\.\.1, got share=1\.5'),
        (lambda: Holes()(torch.rand(4, 8, 8)), r'Holes takes a picture of 1 or 3 channels and comes last, got \(4, 8'),
        (lambda: Downscale(factor=1), 'factor must be a whole number of at least 2, got factor=1'),
        (
            lambda: Downscale(factor=4)(torch.rand(3, 3, 9)),
            r'Downscale needs 4 pixels at least each way, got \(3, 3, 9',
        ),
        (lambda: RandomDegrade(steps=[Downscale(), GaussianNoise()]), r'equally small, got factors \[1, 2\]'),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
