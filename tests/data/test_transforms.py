"""Without these, boxes and masks would drift apart under augmentation, and ignored pixels become a class."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from densezoo.data import (
    IGNORE,
    BoxesFromMasks,
    CocoDetection,
    CropWithoutOneClassDominating,
    ImageFolder,
    InstanceMasks,
    LargeScaleJitter,
    RandomCrop,
    ResizeRange,
    SemanticMask,
    boxes_of_masks,
    build_transforms,
)

DISCS = [
    dict(row=15, column=20, radius=10),
    dict(row=40, column=60, radius=14, category_id=3),
    dict(row=30, column=40, radius=6),
    dict(row=6, column=70, radius=6),
]
AFFINE = dict(degrees=25, translate=(0.1, 0.1), scale=(0.8, 1.3), shear=8)
DETECTION = {
    'flip': [dict(type=v2.RandomHorizontalFlip, p=1.0)],
    'resize': [dict(type=ResizeRange, short=(40, 90), long=130)],
    'shortest': [dict(type=v2.RandomShortestSize, min_size=[37, 55, 81], max_size=111)],
    'crop': [dict(type=RandomCrop, size=(35, 47))],
    'crop and pad': [dict(type=RandomCrop, size=(50, 120), fill=114)],
    'jitter': [dict(type=LargeScaleJitter, size=(64, 64), scale=(0.3, 2.0), fill=(124, 116, 104))],
    'iou crop': [dict(type=v2.RandomIoUCrop), dict(type=v2.SanitizeBoundingBoxes), dict(type=BoxesFromMasks)],
    'zoom out': [dict(type=v2.RandomZoomOut, fill=200, p=1.0)],
    'affine': [dict(type=v2.RandomAffine, fill=90, **AFFINE), dict(type=BoxesFromMasks)],
    'perspective': [dict(type=v2.RandomPerspective, p=1.0), dict(type=BoxesFromMasks)],
    'photometric': [dict(type=v2.RandomPhotometricDistort), dict(type=v2.GaussianBlur, kernel_size=5)],
    'together': [
        dict(type=v2.RandomHorizontalFlip),
        dict(type=ResizeRange, short=60, ratio=(0.5, 2.0)),
        dict(type=v2.RandomApply, transforms=[dict(type=v2.ColorJitter, hue=0.2)]),
        dict(type=RandomCrop, size=(48, 48), min_visible=0.2),
    ],
}


@pytest.mark.parametrize('name', DETECTION)
def test_boxes_and_masks_stay_together(coco, name):
    dataset = CocoDetection(root=coco(DISCS), masks=True, transforms=DETECTION[name])
    seen = 0
    for draw in range(25):
        sample = dataset[(0, draw)]
        target = sample['target']
        assert sample['image'].dtype == torch.uint8
        assert target['masks'].shape == (len(target['boxes']), *sample['image'].shape[-2:])
        assert len(target['labels']) == len(target['boxes']) == len(target['iscrowd']) == len(target['area'])
        if len(target['boxes']):
            assert (boxes_of_masks(target['masks']) - target['boxes']).abs().max() <= 2.0
            assert torch.equal(target['area'], target['masks'].sum(dim=(1, 2)).float())
        seen += len(target['boxes'])
    assert seen >= 25


def test_labels_follow_their_boxes(coco):
    dataset = CocoDetection(root=coco(DISCS), transforms=[dict(type=RandomCrop, size=(20, 25))])
    found = set()
    for draw in range(60):
        target = dataset[(0, draw)]['target']
        found.add(len(target['boxes']))
        for box, label in zip(target['boxes'], target['labels']):
            whole = box[2] - box[0] > 20 or box[3] - box[1] > 20.5  # only the large disc has room for such a side
            assert not whole or label == 0
    assert {0, 1, 2} <= found


def test_a_crop_shrinks_boxes_to_what_is_seen(coco):
    # A ring sector: cropped, the visible part of the mask is far smaller than the visible part of its box.
    corner = [[10, 10, 70, 10, 70, 50, 66, 50, 66, 14, 10, 14]]
    root = coco([dict(segmentation=corner, bbox=[10, 10, 60, 40])])
    dataset = CocoDetection(root=root, masks=True, transforms=[dict(type=RandomCrop, size=(30, 40))])
    sides = []
    for draw in range(40):
        target = dataset[(0, draw)]['target']
        for box, mask in zip(target['boxes'], target['masks']):
            assert (boxes_of_masks(mask[None])[0] - box).abs().max() <= 1
            sides.append(float((box[2:] - box[:2]).min()))
    assert min(sides) < 6 and max(sides) > 10


def test_min_visible_drops_slivers():
    image = tv_tensors.Image(torch.zeros(3, 20, 40, dtype=torch.uint8))
    corners = torch.tensor([[0.0, 0, 20, 20], [18.0, 0, 38, 20]])
    boxes = tv_tensors.BoundingBoxes(corners, format='XYXY', canvas_size=(20, 40))
    sample = {'image': image, 'boxes': boxes, 'labels': torch.tensor([4, 5])}
    kept = set()
    for seed in range(30):
        torch.manual_seed(seed)
        out = RandomCrop(size=(20, 20), min_visible=0.5)(sample)
        for box, label in zip(out['boxes'], out['labels']):
            assert float(box[2] - box[0]) > 10
            kept.add(int(label))
    assert kept == {4, 5}


def test_padding_is_at_the_right_and_bottom_and_ignored():
    image = tv_tensors.Image(torch.ones(3, 10, 12, dtype=torch.uint8))
    mask = SemanticMask(torch.ones(10, 12, dtype=torch.uint8))
    out = RandomCrop(size=(16, 20), fill=7)({'image': image, 'mask': mask})
    assert (out['image'][:, :10, :12] == 1).all() and (out['image'][:, 10:] == 7).all()
    assert (out['mask'][:10, :12] == 1).all()
    assert (out['mask'][10:] == IGNORE).all() and (out['mask'][:, 12:] == IGNORE).all()


@pytest.mark.parametrize(
    'transform',
    [
        v2.Pad(5, fill=114),
        v2.RandomRotation((40, 40), fill=114),
        v2.RandomAffine(0, translate=(0.5, 0.5), fill=114),
        v2.RandomPerspective(p=1.0, distortion_scale=0.8, fill=114),
        v2.ElasticTransform(alpha=900.0, fill=114),
        v2.RandomZoomOut(p=1.0, fill=114),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_new_mask_pixels_are_never_a_class_or_an_instance(transform):
    torch.manual_seed(1)
    sample = {
        'image': tv_tensors.Image(torch.full((3, 30, 40), 9, dtype=torch.uint8)),
        'mask': SemanticMask(torch.full((30, 40), 3, dtype=torch.uint8)),
        'masks': InstanceMasks(torch.ones(2, 30, 40, dtype=torch.uint8)),
        'boxes': tv_tensors.BoundingBoxes([[0.0, 0, 40, 30]] * 2, format='XYXY', canvas_size=(30, 40)),
    }
    out = transform(sample)
    assert type(out['mask']) is SemanticMask and type(out['masks']) is InstanceMasks
    assert set(out['mask'].unique().tolist()) == {3, IGNORE}
    assert set(out['masks'].unique().tolist()) == {0, 1}
    assert torch.equal(out['masks'][0] == 0, out['mask'] == IGNORE)


@pytest.mark.parametrize(
    'size, options, expected',
    [
        ((480, 640), dict(short=800, long=1333), (800, 1067)),
        ((480, 960), dict(short=800, long=1333), (666, 1333)),
        ((960, 480), dict(short=800, long=1333), (1333, 666)),
        ((512, 683), dict(short=512, long=2048, ratio=(0.5, 0.5)), (256, 342)),
        ((100, 3000), dict(short=512, long=2048), (68, 2048)),
        ((10, 20), dict(short=40), (40, 80)),
    ],
)
def test_resize_range_sizes(size, options, expected):
    out = ResizeRange(**options)({'image': tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))})
    assert tuple(out['image'].shape[-2:]) == expected


def test_resize_range_draws():
    sizes = {
        ResizeRange(short=(20, 24))({'image': tv_tensors.Image(torch.zeros(3, 9, 9))})['image'].shape[-1]
        for _ in range(100)
    }
    assert sizes == {20, 21, 22, 23, 24}


def test_one_class_dominates_less():
    mask = torch.zeros(60, 80, dtype=torch.uint8)
    mask[:, 60:] = 1
    mask[50:] = IGNORE
    sample = {'image': tv_tensors.Image(torch.zeros(3, 60, 80, dtype=torch.uint8)), 'mask': SemanticMask(mask)}

    def share(ratio):
        torch.manual_seed(0)
        mixed = 0
        for _ in range(40):
            window = CropWithoutOneClassDominating(size=(20, 20), cat_max_ratio=ratio)(sample)['mask']
            counts = torch.bincount(window[window != IGNORE].long(), minlength=2)
            mixed += int(counts.max() < 0.8 * counts.sum())
        return mixed

    assert share(0.8) > 30 > 25 > share(1.0)
    with pytest.raises(TypeError, match='needs a semantic mask in the sample; use RandomCrop'):
        CropWithoutOneClassDominating(size=8)({'image': sample['image']})


def test_rand_augment_for_classification(tmp_path, save):
    save('train/a/0.png')
    dataset = ImageFolder(root=tmp_path, transforms=[dict(type=v2.RandAugment, interpolation='bilinear')])
    images = [dataset[(0, draw)]['image'] for draw in range(8)]
    assert all(image.dtype == torch.uint8 and image.shape == (3, 60, 80) for image in images)
    assert len({int(image.long().sum()) for image in images}) > 4


def test_boxes_of_masks():
    masks = torch.zeros(4, 7, 9, dtype=torch.bool)
    masks[0, 2:4, 3:8] = True
    masks[1, 6, 8] = True
    masks[2] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 8, 4], [8, 6, 9, 7], [0, 0, 9, 7], [0, 0, 0, 0]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)


def test_transforms_are_built_from_configs():
    built = build_transforms(
        [
            dict(type='torchvision.transforms.v2.Resize', size=(8, 8), interpolation='bicubic'),
            dict(type=v2.RandomApply, transforms=[dict(type=v2.ColorJitter, brightness=0.1)]),
            dict(type=v2.ToDtype, dtype='float32', scale=True),
            np.asarray,
            v2.Identity(),
        ]
    )
    assert built[0].interpolation == v2.InterpolationMode.BICUBIC
    assert isinstance(built[1].transforms[0], v2.ColorJitter) and built[2].dtype == torch.float32
    assert build_transforms(None) == [] and len(build_transforms(dict(type=v2.Identity))) == 1


@pytest.mark.parametrize(
    'spec, message',
    [
        (
            dict(type=v2.Resize, sise=3),
            r"transforms\[0\]: Resize has no argument 'sise', it has size, .*; nearest: 'size'",
        ),
        (dict(type='torchvision.transforms.v2.Resiz'), r"has no 'Resiz'; nearest: torchvision\.transforms\.v2\.Resize"),
        (dict(type='Resize'), "must be a class or a dotted name like 'package.module.Resize'"),
        (dict(type='nowhere.Resize'), "type='nowhere.Resize' cannot be imported"),
        (dict(type=3), 'type must be a class, a callable or its dotted name, got 3'),
        (dict(size=3), r"transforms\[0\] must be a callable or dict\(type=..., ...\), got {'size': 3}"),
        (dict(type=ResizeRange, short=0), r'transforms\[0\]: ResizeRange: short must be positive or a range'),
        (dict(type=v2.RandomApply, transforms=[dict(type=v2.Pad, pading=1)]), r'RandomApply\.transforms: Pad has no'),
    ],
)
def test_bad_configs_are_named(spec, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        build_transforms([spec])
    assert '\n' not in str(caught.value)
