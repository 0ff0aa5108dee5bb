"""Without this the two halves of a universal target could drift apart: an object's mask and its pixels in the semantic
map must be of one class, before and after every transform."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from densezoo.data import CocoPanoptic, DataError, PanopticFolder, RandomCrop, ResizeImageOnly, collate
from densezoo.data.demo import build

CLASSES = ('ground', 'dog', 'sky', 'cat')  # in another order than the JSON's categories, which are cat and dog


@pytest.fixture
def folder(coco):
    """Two pictures: a dog and a cat on ground under sky; nothing but ground."""
    annotations = [
        {'image_id': 100, 'category_id': 7, 'row': 40, 'column': 20, 'radius': 9},
        {'image_id': 100, 'category_id': 3, 'row': 30, 'column': 55, 'radius': 12},
    ]
    root = coco(annotations, images=2)
    (root / 'classes.txt').write_text('\n'.join(CLASSES))
    place = root / 'masks' / 'train'
    place.mkdir(parents=True)
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[:15] = 2
    mask[:, :3] = 255
    mask[coco.disc(60, 80, 40, 20, 9)] = 1
    mask[coco.disc(60, 80, 30, 55, 12)] = 3
    Image.fromarray(mask).save(place / '0.png')
    Image.fromarray(np.zeros_like(mask)).save(place / '1.png')
    return root


def test_objects_and_pixels_share_their_classes(folder):
    dataset = PanopticFolder(root=folder)
    assert dataset.metainfo['classes'] == CLASSES and dataset.metainfo['things'] == (1, 3)
    assert dataset.metainfo['category_ids'] == [None, 7, None, 3] and len(dataset.metainfo['palette']) == 4
    assert len(dataset) == 2, 'a picture without objects is kept: it has stuff'
    target = dataset[0]['target']
    assert target['labels'].tolist() == [1, 3] and target['mask'].dtype == torch.int64
    for label, mask in zip(target['labels'], target['masks']):
        assert (target['mask'][mask] == label).float().mean() > 0.9  # a polygon is not quite the disc
    empty = dataset[1]['target']
    assert empty['masks'].shape == (0, 60, 80) and empty['mask'].unique().tolist() == [0]
    batch = collate([dataset[0], dataset[1]])
    assert [t['mask'].shape for t in batch['targets']] == [(60, 80), (60, 80)]


def test_transforms_move_both_halves_alike(folder):
    transforms = [
        dict(type=v2.RandomHorizontalFlip, p=1.0),
        dict(type=v2.RandomAffine, degrees=20, scale=(0.8, 1.3), fill=114),
        dict(type=RandomCrop, size=(48, 64)),
    ]
    dataset = PanopticFolder(root=folder, transforms=transforms, seed=3)
    seen = 0
    for draw in range(12):
        target = dataset[(0, draw)]['target']
        assert target['mask'].shape == target['masks'].shape[1:] == (48, 64)
        for label, mask in zip(target['labels'], target['masks']):
            assert (target['mask'][mask] == label).float().mean() > 0.9
            seen += 1
    assert seen > 12
    resized = PanopticFolder(root=folder, transforms=[dict(type=ResizeImageOnly, short=30)])[0]
    assert resized['image'].shape == (3, 30, 40) and resized['target']['mask'].shape == (60, 80)


def test_crowds_are_groups_for_evaluation_only(coco, folder):
    path = folder / 'annotations' / 'instances_train.json'
    data = json.loads(path.read_text())
    data['annotations'][1]['iscrowd'] = 1
    path.write_text(json.dumps(data))
    assert PanopticFolder(root=folder)[0]['target']['labels'].tolist() == [1]
    kept = PanopticFolder(root=folder, keep_crowd=True)[0]['target']
    assert kept['labels'].tolist() == [1, 3] and kept['iscrowd'].tolist() == [0, 1]


def test_the_demo_scenes_are_panoptic(tmp_path, monkeypatch):
    monkeypatch.setenv('DENSEZOO_DATA', str(tmp_path))
    monkeypatch.setattr(build, '_SCENES', {'train': 4, 'val': 8})
    dataset = PanopticFolder(root='demo:segmentation', split='val')
    assert dataset.metainfo['things'] == tuple(range(1, 11)) and dataset.metainfo['classes'][0] == 'background'
    for index in range(8):
        target = dataset[index]['target']
        assert len(target['labels']) and target['masks'].any(0).equal(target['mask'] > 0)
        for label, mask in zip(target['labels'], target['masks']):
            assert (target['mask'][mask] == label).all()


def test_errors_of_folders(folder):
    with pytest.raises(DataError, match=r"category 'cat' is not a class of the masks: a, b, c, dog"):
        PanopticFolder(root=folder, classes=('a', 'b', 'c', 'dog'))
    (folder / 'masks' / 'train' / '1.png').unlink()
    with pytest.raises(DataError, match=r'1\.png: has no mask 1'):
        PanopticFolder(root=folder)
    with pytest.warns(UserWarning, match='has no'):
        assert len(PanopticFolder(root=folder, on_error='skip')) == 1
    Image.fromarray(np.zeros((30, 80), dtype=np.uint8)).save(folder / 'masks' / 'train' / '0.png')
    Image.fromarray(np.zeros((60, 80), dtype=np.uint8)).save(folder / 'masks' / 'train' / '1.png')
    with pytest.raises(DataError, match=r'0\.png: mask of another size: \(30, 80\) for a picture of \(60, 80\)'):
        _ = PanopticFolder(root=folder)[0]
    with pytest.raises(DataError, match=r'0\.png: mask of another size'):
        PanopticFolder(root=folder).check()


# ------------------------------------------------------------------------------------------- COCO's own format


@pytest.fixture
def panoptic(save, tmp_path):
    """COCO's layout: categories 5 (thing), 9 (stuff), 2 (thing); ids beyond a byte; a crowd; unknown pixels."""
    save('val2017/7.png', height=20, width=30)
    ids = np.zeros((20, 30), dtype=np.int64)
    ids[:10], ids[10:, 3:] = 70000, 3
    ids[2:8, 4:10], ids[2:8, 10:20], ids[12:18, 20:28] = 300, 301, 66000
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    save('annotations/panoptic_val2017/7.png', pixels=pixels)
    rows = [(70000, 9, 0), (3, 9, 0), (300, 5, 0), (301, 2, 0), (66000, 5, 1)]
    segments = [{'id': number, 'category_id': category, 'iscrowd': crowd} for number, category, crowd in rows]
    data = {
        'images': [{'id': 7, 'file_name': '7.png', 'height': 20, 'width': 30}],
        'annotations': [{'image_id': 7, 'file_name': '7.png', 'segments_info': segments}],
        'categories': [
            {'id': 5, 'name': 'dog', 'isthing': 1, 'color': [1, 2, 3]},
            {'id': 9, 'name': 'sky', 'isthing': 0, 'color': [4, 5, 6]},
            {'id': 2, 'name': 'cat', 'isthing': 1, 'color': [7, 8, 9]},
        ],
    }
    (tmp_path / 'annotations' / 'panoptic_val2017.json').write_text(json.dumps(data))
    return tmp_path, ids, data


def test_coco_panoptic(panoptic):
    root, ids, _ = panoptic
    dataset = CocoPanoptic(root=root, split='val')
    assert dataset.metainfo['classes'] == ('cat', 'dog', 'sky') and dataset.metainfo['things'] == (0, 1)
    assert dataset.metainfo['palette'] == [(7, 8, 9), (1, 2, 3), (4, 5, 6)]
    assert dataset.metainfo['category_ids'] == [2, 5, None] and 'ann_file' not in dataset.metainfo
    target = dataset[0]['target']
    assert target['image_id'] == 7 and target['labels'].tolist() == [1, 0, 1]
    assert target['iscrowd'].tolist() == [0, 0, 1]
    assert target['boxes'].tolist() == [[4, 2, 10, 8], [10, 2, 20, 8], [20, 12, 28, 18]]
    for number, mask in zip((300, 301, 66000), target['masks']):
        assert np.array_equal(mask.numpy(), ids == number)
    expected = np.select([ids == 0, np.isin(ids, (3, 70000)), ids == 301], [255, 2, 0], 1)
    assert np.array_equal(target['mask'].numpy(), expected)
    (root / 'annotations' / 'instances_val2017.json').write_text('{}')
    assert CocoPanoptic(root=root, split='val').metainfo['ann_file'].endswith('instances_val2017.json')


def test_images_may_be_named(panoptic):
    root, ids, data = panoptic
    named = {
        'images': [{**data['images'][0], 'id': 'ADE_val_7'}],
        'annotations': [{**data['annotations'][0], 'image_id': 'ADE_val_7'}],
    }
    (root / 'annotations' / 'panoptic_val2017.json').write_text(json.dumps(data | named))
    target = CocoPanoptic(root=root, split='val')[0]['target']
    assert target['image_id'] == 1 and np.array_equal(target['masks'][0].numpy(), ids == 300)


def test_errors_of_coco_panoptic(panoptic, save):
    root, _, data = panoptic
    path = root / 'annotations' / 'panoptic_val2017.json'

    def changed(**changes):
        path.write_text(json.dumps(data | changes))
        return CocoPanoptic(root=root, split='val')

    segments = data['annotations'][0]['segments_info']
    fewer = [{**data['annotations'][0], 'segments_info': segments[1:]}]
    with pytest.raises(DataError, match=r'7\.png: segment id 70000 is not in the JSON'):
        _ = changed(annotations=fewer)[0]
    with pytest.raises(DataError, match='has no segments'):
        changed(annotations=[])
    with pytest.raises(DataError, match='an annotation is of image_id 8, unknown'):
        changed(annotations=[*data['annotations'], {'image_id': 8, 'segments_info': []}])
    strange = [{**data['annotations'][0], 'segments_info': [*segments[1:], {'id': 70000, 'category_id': 1}]}]
    with pytest.raises(DataError, match='segment 70000 has category_id 1, not one of 2, 5, 9'):
        changed(annotations=strange)
    save('annotations/panoptic_val2017/7.png', pixels=np.zeros((20, 29, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r'must be RGB of 30x20, got an array \(20, 29, 3\)'):
        _ = changed()[0]
    (root / 'annotations' / 'panoptic_val2017' / '7.png').unlink()
    with pytest.raises(DataError, match=r'panoptic_val2017/7\.png: no such file'):
        changed().check()
    with pytest.raises(DataError, match=r"no images with annotations for split='test'.*panoptic_test2017\.json"):
        CocoPanoptic(root=root, split='test')
