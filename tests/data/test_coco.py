"""Without these, labels could shift, masks leave their boxes, and a bad annotation go unnoticed or end in a trace."""

import json
import os

import numpy as np
import pycocotools.coco
import pycocotools.mask
import pytest
import torch
from torchvision.transforms import v2

from densezoo.data import CocoDetection, DataError


def test_boxes_labels_and_meta(coco):
    root = coco([dict(category_id=7), dict(category_id=3, row=20, column=20, radius=8), dict(image_id=102)])
    dataset = CocoDetection(root=root, split='train')
    assert len(dataset) == 2  # images without annotations are left out of training
    assert dataset.metainfo['classes'] == ('cat', 'dog') and dataset.metainfo['category_ids'] == [3, 7]
    assert dataset.metainfo['ann_file'] == str(root / 'annotations/instances_train.json')
    sample = dataset[0]
    target = sample['target']
    assert sample['image'].dtype == torch.uint8 and sample['image'].shape == (3, 60, 80)
    assert type(sample['image']) is torch.Tensor and type(target['boxes']) is torch.Tensor
    torch.testing.assert_close(target['boxes'], torch.tensor([[28.0, 18, 52, 42], [12.0, 12, 28, 28]]))
    assert target['labels'].tolist() == [1, 0] and target['labels'].dtype == torch.int64
    assert target['iscrowd'].tolist() == [0, 0] and target['area'].tolist() == [576, 256]
    assert 'masks' not in target
    assert (target['image_id'], dataset[1]['target']['image_id']) == (100, 102)
    assert dataset.aspect_ratios() == [0.75, 0.75]


def test_no_annotation_at_all_gives_empty_tensors(coco):
    target = CocoDetection(root=coco(), masks=True, keep_empty=True)[2]['target']
    assert target['boxes'].shape == (0, 4) and target['labels'].shape == (0,) and target['masks'].shape == (0, 60, 80)
    assert target['masks'].dtype == torch.bool and target['area'].shape == (0,)


def segmentations(coco):
    """The same two discs as polygons, compressed and uncompressed run lengths."""
    masks = [coco.disc(60, 80, 25, 30, 14), coco.disc(60, 80, 40, 60, 9)]
    packed = []
    for mask in masks:
        lengths = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(int)))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
        packed.append(
            (
                {'size': [60, 80], 'counts': lengths['counts'].decode()},
                {'size': [60, 80], 'counts': [int(count) for count in counts]},
            )
        )
    return masks, packed


@pytest.mark.parametrize('kind', ['polygons', 'compressed', 'uncompressed'])
def test_masks_equal_pycocotools(coco, kind):
    masks, packed = segmentations(coco)
    if kind == 'polygons':
        shapes = [[coco.polygon(25, 30, 14), coco.polygon(10, 60, 6)], [coco.polygon(40, 60, 9.3, points=5)]]
    else:
        shapes = [pair[kind == 'uncompressed'] for pair in packed]
    annotations = [
        dict(segmentation=shape, row=25 + 15 * number, column=30 + 30 * number, radius=14 - 5 * number)
        for number, shape in enumerate(shapes)
    ]
    root = coco(annotations)
    reference = pycocotools.coco.COCO(str(root / 'annotations/instances_train.json'))
    target = CocoDetection(root=root, masks=True)[0]['target']
    assert target['masks'].dtype == torch.bool and target['masks'].is_contiguous()
    for number, annotation in enumerate(reference.loadAnns([1, 2])):
        assert np.array_equal(target['masks'][number].numpy(), reference.annToMask(annotation).astype(bool))
        assert target['area'][number] == target['masks'][number].sum() > 100
    if kind != 'polygons':
        assert np.array_equal(target['masks'].numpy(), np.stack(masks))


def test_masks_without_opencv_are_the_same(coco, monkeypatch):
    import densezoo.data.coco as module

    dataset = CocoDetection(root=coco([dict(), dict(row=20)]), masks=True)
    with_opencv = dataset[0]['target']['masks']
    monkeypatch.setattr(module, '_opencv', lambda: None)
    assert torch.equal(dataset[0]['target']['masks'], with_opencv)


def test_crowds_are_dropped_in_training_and_kept_otherwise(coco):
    _, packed = segmentations(coco)
    annotations = [dict(iscrowd=1, segmentation=packed[0][1], category_id=3), dict(row=40, column=60, radius=9)]
    assert CocoDetection(root=coco(annotations))[0]['target']['labels'].tolist() == [1]
    coco(annotations, split='val')
    target = CocoDetection(
        root=coco(annotations, split='val'),
        split='val',
        masks=True,
        transforms=[dict(type=v2.RandomHorizontalFlip, p=1.0)],
    )[0]['target']
    assert target['labels'].tolist() == [0, 1] and target['iscrowd'].tolist() == [1, 0]
    assert len(CocoDetection(root=coco(annotations, split='val'), split='val')) == 4  # evaluation keeps empty images


def test_boxes_outside_are_clipped_or_dropped_and_counted(coco):
    root = coco([dict(bbox=[70, 50, 30, 30]), dict(bbox=[10, 10, 0, 20]), dict(bbox=[200, 10, 20, 20]), dict()])
    with pytest.warns(
        UserWarning,
        match=r'2 boxes of zero area or outside the picture dropped, 1 clipped .*'
        r'first: 0\.png: annotation 2: bbox \[10, 10, 0, 20\] .* has zero area',
    ):
        dataset = CocoDetection(root=root)
    assert dataset[0]['target']['boxes'].tolist() == [[70, 50, 80, 60], [28, 18, 52, 42]]
    with pytest.raises(
        DataError,
        match=r'3 problems: 0\.png: annotation 1: bbox .* in a picture of 80x60 leaves the '
        r'picture; .*zero area; .*lies outside the picture',
    ):
        CocoDetection(root=root, bad_boxes='raise')
    with pytest.warns(UserWarning, match='3 problems'):
        assert len(CocoDetection(root=root, bad_boxes='raise', on_error='skip')[0]['target']['boxes']) == 1


@pytest.mark.parametrize(
    'annotation, reason',
    [
        (dict(category_id=9), 'annotation 1 has category_id 9, not one of 3, 7'),
        (dict(image_id=5), 'annotation 1 is of image_id 5, which is unknown'),
        (dict(bbox=[1, 2, 3]), r'bbox must be four finite numbers \(x, y, width, height\), got \[1, 2, 3\]'),
        (dict(bbox=[1, 2, float('nan'), 3]), 'bbox must be four finite numbers'),
        (dict(segmentation=[[1, 2, 3, 4]]), 'segmentation has no polygon of at least three points'),
        (dict(segmentation=None), 'segmentation must be polygons or run lengths'),
        (dict(segmentation={'size': [50, 80], 'counts': [9]}), r'mask of another size: .*, the picture \[60, 80\]'),
        (dict(segmentation={'size': [60, 80], 'counts': [40]}), 'run lengths sum to 40, not to 60 x 80'),
    ],
)
def test_bad_annotations_are_named(coco, annotation, reason):
    root = coco([annotation, dict(row=20)])
    with pytest.raises(DataError, match=reason) as caught:
        CocoDetection(root=root, masks=True)
    assert '\n' not in str(caught.value)
    with pytest.warns(UserWarning, match=reason):
        assert len(CocoDetection(root=root, masks=True, on_error='skip')[0]['target']['boxes']) == 1


def test_bad_images_are_named(coco, tmp_path):
    root = coco([dict(), dict(image_id=101), dict(image_id=102)])
    (root / 'images/train/1.png').unlink()
    with pytest.raises(DataError, match=r'images/train/1\.png: no such file'):
        CocoDetection(root=root)
    with pytest.warns(UserWarning, match='1 problem: .*no such file'):
        assert len(CocoDetection(root=root, on_error='skip')) == 2
    path = root / 'annotations/instances_train.json'
    data = json.loads(path.read_text())
    data['images'][2]['width'] = 90
    data['images'].append(dict(data['images'][0]))
    data['images'].append({'id': 9, 'file_name': 'x.png', 'height': None, 'width': 3})
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r'image id 100 is used twice; x\.png: width and height must be positive'):
        CocoDetection(root=root)
    with pytest.warns(UserWarning):
        dataset = CocoDetection(root=root, on_error='skip')
    dataset.on_error = 'raise'
    for look in (dataset.check, lambda: dataset[1]):
        with pytest.raises(DataError, match=r'2\.png: the picture is 80x60, but the annotations say 90x60'):
            look()


def test_annotations_of_unrotated_pixels_are_noticed(coco, save):
    from PIL import Image

    root = coco([dict()], images=1)
    exif = Image.new('RGB', (1, 1)).getexif()
    exif[0x0112] = 6
    save('images/train/0.png', exif=exif)
    dataset = CocoDetection(root=root)
    for look in (dataset.check, lambda: dataset[0]):
        with pytest.raises(DataError, match=r'60x80, but the annotations say 80x60; it looks rotated .*exif=False'):
            look()
    assert CocoDetection(root=root, exif=False)[0]['image'].shape == (3, 60, 80)


def test_missing_or_broken_json_is_named(coco, tmp_path):
    root = coco([dict()])
    with pytest.raises(DataError, match=r"no images with annotations for split='test' .*looked for images/test with"):
        CocoDetection(root=root, split='test')
    path = root / 'annotations/instances_train.json'
    path.write_text('{"images": [')
    with pytest.raises(DataError, match=r'instances_train\.json: is not JSON'):
        CocoDetection(root=root)
    path.write_text('{"images": []}')
    with pytest.raises(DataError, match="a COCO file needs a list 'categories'"):
        CocoDetection(root=root)
    path.write_text('{"images": [], "categories": [{"id": 1, "name": "a"}]}')
    with pytest.raises(DataError, match=r"CocoDetection: no usable image for split='train'"):
        CocoDetection(root=root)


def test_a_selection_of_classes(coco):
    root = coco([dict(category_id=3), dict(category_id=7, image_id=101)])
    dataset = CocoDetection(root=root, classes=['dog'])
    assert len(dataset) == 1 and dataset[0]['target']['labels'].tolist() == [0]
    assert dataset.metainfo['category_ids'] == [7]
    with pytest.raises(DataError, match=r"classes names 'cow', but .* has cat, dog"):
        CocoDetection(root=root, classes=['cow'])


@pytest.mark.parametrize(
    'images, annotations',
    [
        ('train2017', 'annotations/instances_train2017.json'),
        ('train', 'train/_annotations.coco.json'),
        ('pictures', 'my.json'),
    ],
)
def test_other_layouts(coco, images, annotations):
    root = coco([dict()])
    os.renames(root / 'images/train', root / images)
    os.renames(root / 'annotations/instances_train.json', root / annotations)
    given = dict(images=images, ann_file=annotations) if images == 'pictures' else {}
    assert len(CocoDetection(root=root, **given)) == 1
