"""Without these, class ids would shift by one, ignored pixels train a class, and a wrong mask pass unseen."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from densezoo.data import ADE20K, Cityscapes, DataError, MaskFolder, ResizeImageOnly, ResizeRange, VOCSegmentation
from densezoo.data.palettes import ADE20K_CLASSES, ADE20K_PALETTE, CITYSCAPES_CLASSES, voc_colour

IDS = (np.arange(60)[:, None] // 20 + np.arange(80)[None] // 40).astype(np.uint8)  # 0..3


@pytest.fixture
def folder(tmp_path, save):
    for number in range(3):
        save(f'images/train/s/{number}.jpg')
        save(f'masks/train/s/{number}.png', pixels=IDS)
    (tmp_path / 'classes.txt').write_text('a\nb\nc\nd\n')
    return tmp_path


def test_ids_and_meta(folder):
    dataset = MaskFolder(root=folder)
    sample = dataset[1]
    assert sample['image'].shape == (3, 60, 80) and sample['image'].dtype == torch.uint8
    assert sample['target']['mask'].dtype == torch.int64 and type(sample['target']['mask']) is torch.Tensor
    assert np.array_equal(sample['target']['mask'].numpy(), IDS)
    assert dataset.metainfo['classes'] == ('a', 'b', 'c', 'd') and len(set(dataset.metainfo['palette'])) == 4
    (folder / 'classes.json').write_text(json.dumps({'classes': list('wxyz'), 'palette': [[1, 2, 3]] * 4}))
    assert MaskFolder(root=folder).metainfo == {'classes': tuple('wxyz'), 'palette': [(1, 2, 3)] * 4}


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(reduce_zero_label=True, classes='xyz'), {0: 255, 1: 0, 2: 1, 3: 2}),
        (dict(label_map={0: 1, 1: 0, 2: 255, 3: 0}, classes='xy'), {0: 1, 1: 0, 2: 255, 3: 0}),
    ],
)
def test_label_maps(folder, options, expected):
    mask = MaskFolder(root=folder, **options)[0]['target']['mask'].numpy()
    assert np.array_equal(mask, np.vectorize(expected.get)(IDS))


@pytest.mark.parametrize('kind', ['palette', 'colour', 'grey rgb', '16 bit'])
def test_masks_in_other_forms(folder, kind):
    colours = np.array([voc_colour(number + 1) for number in range(4)], dtype=np.uint8)
    path = folder / 'masks/train/s/0.png'
    if kind == 'palette':
        picture = Image.fromarray(IDS, mode='P')
        picture.putpalette(colours.ravel().tolist())
        picture.save(path)
    else:
        pixels = {'colour': colours[IDS], 'grey rgb': IDS[..., None].repeat(3, 2), '16 bit': IDS.astype(np.uint16)}
        Image.fromarray(pixels[kind]).save(path)
    assert np.array_equal(MaskFolder(root=folder)[0]['target']['mask'].numpy(), IDS)


def test_unknown_ids_and_colours_are_named(folder, save):
    dataset = MaskFolder(root=folder, classes='abc')
    with pytest.raises(DataError, match=r's/0\.png: class id 3 is not in the 3 classes \(allowed .*: 0\.\.2, 255\)'):
        dataset[0]
    with pytest.raises(DataError, match=r'3 problems: .*class id 3'):
        dataset.check(decode=True)
    save('masks/train/s/0.png')
    with pytest.raises(DataError, match=r's/0\.png: colour \(\d+, \d+, \d+\) is not in the palette of 4 classes'):
        MaskFolder(root=folder)[0]
    save('masks/train/s/0.png', pixels=IDS.astype(np.uint16) * 400)
    with pytest.raises(DataError, match=r's/0\.png: class id 400, 800, 1200 is not in the 4 classes'):
        MaskFolder(root=folder)[0]


def test_a_mask_of_another_size_is_named(folder, save):
    save('masks/train/s/1.png', pixels=IDS[:50])
    dataset = MaskFolder(root=folder)
    message = r's/1\.jpg: mask of another size: the picture is 80x60, .*s/1\.png is 80x50'
    with pytest.raises(DataError, match=message):
        dataset[1]
    with pytest.raises(DataError, match='1 problem: .*' + message[8:]):
        dataset.check()
    dataset.on_error = 'skip'
    with pytest.warns(UserWarning):
        dataset.check()
    assert len(dataset) == 2


def test_missing_masks_and_names_are_named(folder):
    (folder / 'masks/train/s/2.png').unlink()
    with pytest.raises(DataError, match=r's/2\.jpg: has no mask s/2\.\* in '):
        MaskFolder(root=folder)
    with pytest.warns(UserWarning, match='1 problem'):
        assert len(MaskFolder(root=folder, on_error='skip')) == 2
    (folder / 'classes.txt').unlink()
    with pytest.raises(DataError, match=r'the names of the classes are needed: .*classes\.txt'):
        MaskFolder(root=folder, on_error='skip')
    with pytest.raises(DataError, match="images: no folder 'images/val', 'val/images' in root="):
        MaskFolder(root=folder, split='val')
    with pytest.raises(ValueError, match='palette must have one colour per class, got 1 for 4'):
        MaskFolder(root=folder, classes='abcd', palette=[(1, 2, 3)], on_error='skip')


def test_evaluation_keeps_the_mask_at_its_size(folder):
    sample = MaskFolder(root=folder, transforms=[dict(type=ResizeImageOnly, short=30, long=2048)])[0]
    assert sample['image'].shape == (3, 30, 40) and sample['target']['mask'].shape == (60, 80)
    assert sample['target']['size'] == (30, 40) and sample['target']['original_size'] == (60, 80)
    both = MaskFolder(root=folder, transforms=[dict(type=ResizeRange, short=30)])[0]
    assert both['target']['mask'].shape == (30, 40)


def test_ade20k(tmp_path, save):
    save('images/training/a.jpg')
    save('annotations/training/a.png', pixels=IDS * 50)
    dataset = ADE20K(root=tmp_path, split='train')
    assert len(ADE20K_CLASSES) == len(ADE20K_PALETTE) == len(dataset.metainfo['classes']) == 150
    assert (ADE20K_CLASSES[0], ADE20K_CLASSES[12], ADE20K_CLASSES[149]) == ('wall', 'person', 'flag')
    assert ADE20K_PALETTE[0] == (120, 120, 120) and ADE20K_PALETTE[149] == (92, 0, 255)
    expected = np.array([255, 49, 99, 149])[IDS]
    assert np.array_equal(dataset[0]['target']['mask'].numpy(), expected)


def test_cityscapes(tmp_path, save):
    stored = np.array([7, 26, 33, 4], dtype=np.uint8)[IDS]  # road, car, bicycle and static, which is not evaluated
    save('leftImg8bit/val/bonn/bonn_0_leftImg8bit.png')
    save('gtFine/val/bonn/bonn_0_gtFine_labelIds.png', pixels=stored)
    save('gtFine/val/bonn/bonn_0_gtFine_instanceIds.png', pixels=stored)
    dataset = Cityscapes(root=tmp_path, split='val')
    assert len(dataset) == 1 and len(CITYSCAPES_CLASSES) == 19
    assert np.array_equal(dataset[0]['target']['mask'].numpy(), np.array([0, 13, 18, 255])[IDS])
    assert dataset.metainfo['classes'][13] == 'car' and dataset.metainfo['palette'][13] == (0, 0, 142)


def test_voc_segmentation(tmp_path, save):
    home = tmp_path / 'VOCdevkit/VOC2012'
    save('VOCdevkit/VOC2012/JPEGImages/x.jpg')
    ids = np.array([0, 15, 20, 255], dtype=np.uint8)[IDS]
    picture = Image.fromarray(ids, mode='P')
    picture.putpalette([value for index in range(256) for value in voc_colour(index)])
    (home / 'SegmentationClass').mkdir()
    picture.save(home / 'SegmentationClass/x.png')
    (home / 'ImageSets/Segmentation').mkdir(parents=True)
    (home / 'ImageSets/Segmentation/train.txt').write_text('x\n')
    dataset = VOCSegmentation(root=tmp_path)
    assert np.array_equal(dataset[0]['target']['mask'].numpy(), ids)
    assert dataset.metainfo['classes'][15] == 'person' and dataset.metainfo['palette'][15] == (192, 128, 128)
    with pytest.raises(DataError, match=r"split='val': no file .*val\.txt; there are: train"):
        VOCSegmentation(root=tmp_path, split='val')
