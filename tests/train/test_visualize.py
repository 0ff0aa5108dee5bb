"""Pictures: what a person looks at to judge a run; a shifted box or a swapped channel there misleads as a bug would."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from densezoo.train.visualize import as_pixels, curves, draw, grid, save_pictures

META = {
    'classes': ('cat', 'dog', 'a very long class name that does not fit'),
    'palette': [(255, 0, 0), (0, 255, 0), (0, 0, 255)],
}
BAND = 22


def grey(height, width, value=100):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def detection(boxes, labels, scores, size=None):
    result = {
        'boxes': torch.tensor(boxes).reshape(-1, 4).float(),
        'labels': torch.tensor(labels, dtype=torch.int64),
        'scores': torch.tensor(scores).float(),
    }
    if size is not None:
        masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        result['masks'] = masks
    return result


def changed(picture, value=100):
    return (picture != value).any(2)


# ------------------------------------------------------------------------------------------------- detection


def test_boxes_are_where_they_should_be():
    panel = draw(grey(64, 96), detection([[40, 30, 70, 50]], [1], [0.9]), metainfo=META)[BAND:]
    assert panel.shape == (256, 384, 3)  # four times as large
    where = changed(panel)
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    assert rows[-1] == 50 * 4 - 1 and columns[0] == 40 * 4
    assert (panel[30 * 4 : 50 * 4, 40 * 4] == (0, 255, 0)).all()  # the left side, in the class's colour
    assert not where[33 * 4 : 48 * 4, 43 * 4 : 68 * 4].any()  # nothing inside
    name = panel[30 * 4 - 18 : 30 * 4 - 4, 40 * 4 : 40 * 4 + 30]
    assert (name == (0, 255, 0)).all(2).any() and (name == 0).all(2).any()  # black letters on green


def test_masks_are_filled_and_weak_or_surplus_detections_left_out():
    result = detection([[10, 20, 40, 60], [50, 20, 80, 60], [60, 70, 90, 90]], [0, 2, 1], [0.8, 0.1, 0.5], (96, 96))
    panel = draw(grey(96, 96), result, metainfo=META)[BAND:]
    inside = panel[120, 75]
    assert inside[0] > 140 and inside[1] < 100  # reddish
    assert not changed(panel)[150, 190]  # score 0.1
    assert changed(panel)[240, 225]
    best = draw(grey(96, 96), result, metainfo=META, max_boxes=1)[BAND:]
    assert changed(best)[120, 75] and not changed(best)[240, 225]


def test_results_refer_to_the_original_size_and_truth_to_the_network_s():
    """A 100x200 picture was shown to the network at 50x100."""
    target = {
        'size': (50, 100),
        'original_size': (100, 200),
        'boxes': torch.tensor([[10.0, 10, 40, 40]]),
        'labels': torch.tensor([0]),
        'masks': torch.zeros(1, 50, 100, dtype=torch.bool),
    }
    target['masks'][0, 10:40, 10:40] = True
    picture = draw(grey(50, 100), detection([[20, 20, 80, 80]], [0], [1.0], (100, 200)), target, META)
    assert picture.shape == (BAND + 300, 2 * 600 + 4, 3)
    left, right = picture[BAND:, :600], picture[BAND:, 604:]
    assert (left[100:240, 60:240] == right[100:240, 60:240]).all() and changed(left)[150, 150]


@pytest.mark.parametrize('size', [(1, 1), (5, 300), (700, 400)])
def test_odd_pictures_and_boxes_at_the_rim(size):
    height, width = size
    boxes = [[0, 0, width, height], [width - 1, height - 1, width, height], [-5, -5, 0, 0]]
    picture = draw(grey(*size), detection(boxes, [2, 2, 7], [0.9, 0.8, 0.7]), metainfo=META)
    assert picture.dtype == np.uint8 and picture.shape[0] >= height + BAND
    nothing = draw(grey(*size), detection([], [], []), {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0)})
    assert nothing.ndim == 3


# ---------------------------------------------------------------------------------- the other kinds of result


def test_segmentation_beside_the_truth():
    mask = torch.zeros(128, 128, dtype=torch.int64)
    mask[:64], mask[64:, :64] = 1, 255
    picture = draw(
        grey(64, 64),
        {'mask': mask},
        {'mask': mask.roll(64, 1)},
        {'classes': 'abc', 'palette': [(0, 0, 0), (255, 0, 0), (0, 0, 255)]},
    )
    assert picture.shape == (BAND + 256, 3 * 256 + 8, 3)
    plain, found, truth = (picture[BAND:, x : x + 256] for x in (0, 260, 520))
    assert not changed(plain).any()
    assert found[60, 60, 0] > 180 and found[60, 60, 2] < 80
    assert (found[200, 60] == found[200, 200]).all()  # ignored and black background: grey alike
    assert (found[128:] == truth[128:]).all() and (found[:100] == truth[:100]).all()


def test_panoptic_segments_keep_their_rims_and_stand_beside_the_truth():
    ids = torch.zeros(128, 128, dtype=torch.int64)
    ids[:64, :64], ids[:64, 64:], ids[64:, :64] = 1, 2, 3  # two touching objects of a class, stuff, nothing
    meta = {'classes': 'ab', 'palette': [(0, 0, 0), (255, 0, 0)], 'things': (1,)}
    masks = torch.stack([ids == 2, ids == 1])
    target = {'mask': torch.where(ids == 0, 255, (masks.any(0)).long()), 'masks': masks, 'labels': torch.tensor([1, 1])}
    picture = draw(grey(64, 64), {'panoptic': ids, 'segment_labels': torch.tensor([1, 1, 0])}, target, meta)
    assert picture.shape == (BAND + 256, 3 * 256 + 8, 3)
    found, truth = (picture[BAND:, x : x + 256] for x in (260, 520))
    assert (found == truth).all()
    assert found[60, 60, 0] > 150 and tuple(found[60, 127]) == tuple(found[60, 128]) == (255, 0, 0)
    assert (found[200, 60] == found[200, 200]).all()  # black stuff and nothing: grey alike
    empty = draw(grey(64, 64), {'panoptic': ids * 0, 'segment_labels': torch.zeros(0, dtype=torch.int64)}, {}, meta)
    assert empty.shape == (BAND + 256, 2 * 256 + 4, 3)


def test_restoration_strip():
    clean = torch.rand(3, 60, 80)
    picture = draw(clean.flip(0), {'image': clean}, {'clean': clean})
    assert picture.shape == (BAND + 300, 3 * 400 + 8, 3)
    before, after, truth = (picture[BAND:, x : x + 400] for x in (0, 404, 808))
    assert (after == truth).all() and (before == truth[..., ::-1]).all()
    assert (truth[::5, ::5] == as_pixels(clean)).all()  # enlarged without smoothing


@pytest.mark.parametrize('label, colour', [(1, (24, 120, 48)), (0, (190, 30, 30)), (None, (45, 45, 45))])
def test_classification_caption(label, colour):
    target = {} if label is None else {'label': label}
    picture = draw(grey(32, 32), {'label': 1, 'scores': torch.tensor([0.1, 0.9])}, target, META)
    assert picture.shape == (BAND + 256, 256, 3)
    assert tuple(picture[0, 0]) == colour
    assert (picture[:BAND] > 240).all(2).any()  # letters
    assert not changed(picture[BAND:]).any()


def test_grey_pictures_and_floats():
    assert (as_pixels(torch.full((1, 2, 2), 0.5)) == 128).all()
    assert (as_pixels(torch.tensor([float('nan'), -1.0, 2.0]).reshape(3, 1, 1))[0, 0] == (0, 0, 255)).all()


# ---------------------------------------------------------------------------------------------- sheets, files


def test_grid_places_every_picture():
    pictures = [np.full((10 + i, 20, 3), i, dtype=np.uint8) for i in range(5)]
    sheet = grid(pictures, 2, gap=3)
    assert sheet.shape == (3 * (14 + 3) + 3, 2 * (20 + 3) + 3, 3)
    for number in range(5):
        top, left = 3 + (number // 2) * 17, 3 + (number % 2) * 23
        assert (sheet[top : top + 10 + number, left : left + 20] == number).all()
    assert (sheet[:3] == 255).all()
    height, width = grid([np.zeros((30, 90, 3), np.uint8)] * 12).shape[:2]
    assert 0.5 < width / height < 2


def test_save_pictures_round_trip(tmp_path):
    images = [grey(32, 32, value) for value in (10, 200)]
    results = [{'label': 0, 'scores': torch.tensor([0.7, 0.3])}] * 2
    files = save_pictures(tmp_path / 'new', images, results, [{'file': 'a/one.jpg', 'label': 0}, {'label': 1}], META)
    assert [file.name for file in files] == ['000_one.png', '001_picture.png', 'sheet.png']
    for file, image, result, label in zip(files, images, results, (0, 1)):
        assert (np.asarray(Image.open(file)) == draw(image, result, {'label': label}, META)).all()
    assert save_pictures(tmp_path / 'none', [], []) == []
    with pytest.raises(ValueError, match='one result and target per image are needed, got 2 images, 1 results'):
        save_pictures(tmp_path, images, results[:1])


def test_curves(tmp_path):
    rows = [
        {'kind': 'train', 'step': step, 'loss': 2 / step, 'loss_box': 1 / step, 'lr': 0.1, 'time': 0.2}
        for step in range(1, 50)
    ]
    rows.append({'kind': 'val', 'step': 49, 'mIoU': 0.5, 'aAcc': 0.7})
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    curves(rows, tmp_path / 'a.png')
    curves(tmp_path / 'log.jsonl', tmp_path / 'b.png')
    first, second = (np.asarray(Image.open(tmp_path / f'{name}.png')) for name in 'ab')
    assert (first == second).all() and (first[..., :3] != 255).any()
    curves(rows[:-1], tmp_path / 'short.png')
    assert Image.open(tmp_path / 'short.png').size[1] < first.shape[0]  # two panels less
    curves([], tmp_path / 'nothing.png')


@pytest.mark.parametrize(
    'make, message',
    [
        (
            lambda: draw(grey(4, 4), {'points': 1}),
            r"a result holds 'panoptic', 'boxes', 'mask', 'image' or 'label', got \['points'\]",
        ),
        (
            lambda: draw(torch.zeros(2, 3, 4, 4), {'label': 0}),
            r'must be \(3, H, W\) or \(1, H, W\), got \(2, 3, 4, 4\)',
        ),
        (lambda: draw(np.zeros((4, 4)), {'label': 0}), r'an array must be uint8 \(H, W, 3\)'),
        (lambda: grid([]), 'grid needs at least one picture'),
    ],
)
def test_errors_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
