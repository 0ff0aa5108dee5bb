"""Without these, the boxes of a mosaic would not lie on their pixels."""

import pytest
import torch
from torchvision.transforms import v2

from densezoo.data import CocoDetection, Mosaic, RandomCrop, boxes_of_masks

DISCS = [
    dict(image_id=100 + number, row=20 + 5 * number, column=30 + 8 * number, radius=9 + number) for number in range(4)
]


AFTER = [dict(type=v2.RandomHorizontalFlip), dict(type=RandomCrop, size=(70, 90))]


@pytest.mark.parametrize('transforms', [None, AFTER])
def test_boxes_and_masks_stay_together(coco, transforms):
    inner = dict(type=CocoDetection, root=coco(DISCS), masks=True)
    dataset = Mosaic(dataset=inner, size=(48, 64), transforms=transforms)
    counts = set()
    for draw in range(25):
        sample = dataset[(draw % 4, draw)]
        target = sample['target']
        assert sample['image'].shape == ((3, 96, 128) if transforms is None else (3, 70, 90))
        assert sample['image'].dtype == torch.uint8 and target['masks'].shape[1:] == sample['image'].shape[1:]
        if len(target['boxes']):
            assert (boxes_of_masks(target['masks']) - target['boxes']).abs().max() <= 2.0
        counts.add(len(target['boxes']))
        assert target['original_size'] == (96, 128) and target['draw'] == draw
    assert max(counts) >= 3
    assert torch.equal(dataset[(1, 7)]['image'], dataset[(1, 7)]['image'])


def test_pixels_lie_under_their_boxes(coco, save):
    root = coco([dict(image_id=100 + number, bbox=[20, 10, 30, 25]) for number in range(4)])
    for number in range(4):
        pixels = torch.zeros(60, 80, 3, dtype=torch.uint8)
        pixels[10:35, 20:50] = 250
        save(f'images/train/{number}.png', pixels=pixels.numpy())
    dataset = Mosaic(dataset=CocoDetection(root=root), size=(60, 80), fill=0)
    checked = 0
    for draw in range(10):
        sample = dataset[(0, draw)]
        bright = sample['image'][0] > 125
        covered = torch.zeros_like(bright)
        for left, top, right, bottom in sample['target']['boxes'].round().int().tolist():
            covered[top:bottom, left:right] = True
            checked += 1
        assert torch.equal(bright, covered)
    assert checked > 25


def test_probability_and_the_rest_of_a_dataset(coco, tmp_path):
    inner = CocoDetection(root=coco(DISCS))
    plain = Mosaic(dataset=inner, size=(48, 64), probability=0.0)
    assert len(plain) == 4 and plain.metainfo is inner.metainfo and plain.skipped == 0 and plain.check() == []
    assert torch.equal(plain[(2, 3)]['image'], inner[(2, 3)]['image'])
    assert plain[2]['target']['boxes'].tolist() == inner[2]['target']['boxes'].tolist()
    assert plain.aspect_ratios() == inner.aspect_ratios()
    with pytest.raises(TypeError, match='dataset must be a detection dataset, got int'):
        Mosaic(dataset=3, size=(8, 8))
    with pytest.raises(ValueError, match=r'probability must lie in 0\.\.1'):
        Mosaic(dataset=inner, size=(8, 8), probability=2)
