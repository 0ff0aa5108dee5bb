"""Demo data: what would break without these tests is trust in every number of the quickstarts (a leak between training
and validation), and the annotations that detectors, segmenters and evaluators read."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from densezoo.data.demo import MissingExtra, build, resolve, scenes, sources

SMALL = {'train': 40, 'val': 16}  # scenes; the whole set differs in number only


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """All four datasets, with few scenes, built without network."""
    folder = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DENSEZOO_DATA', str(folder))
        patch.setattr(build, '_SCENES', SMALL)
        patch.setattr(socket, 'socket', lambda *_, **__: pytest.fail('the demo data opened a connection'))
        return {name: resolve(f'demo:{name}') for name in build.NAMES}


@pytest.fixture(scope='module')
def coco(home):
    return {part: COCO(str(home['detection'] / f'annotations/instances_{part}.json')) for part in sources.SPLITS}


# ------------------------------------------------------------------------------------------------- the split


def test_split_is_disjoint_and_complete():
    split = sources.split()
    for kind, everything in (('digits', set(range(1797))), ('photographs', set(sources._PHOTOGRAPHS))):
        train, val = (set(split[kind][part]) for part in sources.SPLITS)
        assert train | val == everything
        assert not train & val
    assert len(split['digits']['val']) == 397
    labels = sources.digits().labels
    share = np.bincount(labels[split['digits']['val']]) / np.bincount(labels)
    assert np.abs(share - 397 / 1797).max() < 0.01


def test_every_picture_keeps_to_its_split(home, coco):
    split = json.loads((home['detection'] / 'split.json').read_text())
    assert split == sources.split()
    for part in sources.SPLITS:
        assert {ann['digit'] for ann in coco[part].anns.values()} <= set(split['digits'][part])
        assert {image['photograph'] for image in coco[part].imgs.values()} <= set(split['photographs'][part])
        scans = [int(file.stem) for file in (home['classification'] / part).glob('*/*.png')]
        assert sorted(scans) == split['digits'][part]
        crops = [file.stem.split('_')[0].split('-')[0] for file in (home['restoration'] / part).glob('*.png')]
        assert crops and set(crops) <= set(split['photographs'][part])


def test_photographs_show_different_things():
    """No two of them share a scene, as the two views of a stereo pair would: thumbnails correlate weakly."""

    def thumbnail(name):
        grey = Image.fromarray(sources.photograph(name)).convert('L').resize((24, 24), Image.Resampling.BOX)
        values = np.asarray(grey, dtype=np.float64).ravel()
        return (values - values.mean()) / values.std()

    names = sorted(sources._PHOTOGRAPHS)
    thumbnails = np.array([thumbnail(name) for name in names])
    likeness = thumbnails @ thumbnails.T / thumbnails.shape[1] - np.eye(len(names))
    assert likeness.max() < 0.75


def test_digits_keep_their_class(home):
    labels = sources.digits().labels
    files = list(home['classification'].glob('*/*/*.png'))
    assert len(files) == 1797
    assert all(labels[int(file.stem)] == int(file.parent.name) for file in files)
    with Image.open(files[0]) as picture:
        assert picture.size == (32, 32)


# -------------------------------------------------------------------------------------------------- building


def test_two_builds_are_byte_identical(home, tmp_path):
    """The second build runs in another process with another hash seed."""
    names = ('detection', 'restoration')
    code = (
        'from densezoo.data.demo import build, resolve\n'
        f'build._SCENES = {SMALL!r}\nfor name in {names!r}: print(resolve("demo:" + name))'
    )
    environment = {**os.environ, 'DENSEZOO_DATA': str(tmp_path), 'PYTHONHASHSEED': '7'}
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment)
    for name, line in zip(names, run.stdout.splitlines(), strict=True):
        other = pathlib.Path(line)
        files = sorted(file.relative_to(home[name]) for file in home[name].rglob('*') if file.is_file())
        assert len(files) > 30
        assert files == sorted(file.relative_to(other) for file in other.rglob('*') if file.is_file())
        assert all((home[name] / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_of_two_builders_the_first_wins_and_nothing_is_left_over(tmp_path, monkeypatch):
    """While one process draws its scenes, another builds the same folder from start to end."""
    monkeypatch.setenv('DENSEZOO_DATA', str(tmp_path))
    monkeypatch.setattr(build, '_SCENES', {'train': 2, 'val': 2})
    places = []

    def overtaken(**arguments):
        monkeypatch.setattr(build, 'draw_scene', scenes.draw_scene)
        assert not places
        places.append(resolve('demo:detection'))
        (places[0] / 'first').touch()
        return scenes.draw_scene(**arguments)

    monkeypatch.setattr(build, 'draw_scene', overtaken)
    assert resolve('demo:detection') == places[0]
    assert (places[0] / 'first').exists()
    assert [folder.name for folder in places[0].parent.iterdir()] == ['scenes']


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setenv('DENSEZOO_DATA', str(tmp_path))
    monkeypatch.setattr(build, 'draw_scene', interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve('demo:detection')
    assert list((tmp_path / f'demo-v{build.VERSION}').iterdir()) == []


def test_detection_and_segmentation_share_a_folder_and_sizes_do_not(home, tmp_path, monkeypatch):
    assert home['detection'] == home['segmentation']
    monkeypatch.setenv('DENSEZOO_DATA', str(tmp_path))
    monkeypatch.setattr(build, '_SCENES', {'train': 2, 'val': 2})
    larger = resolve('demo:segmentation@128')
    assert larger != home['segmentation'] and larger.name.endswith('-128')
    for kind in ('images', 'masks'):
        with Image.open(larger / kind / 'val/00000.png') as picture:
            assert picture.size == (128, 128)


@pytest.mark.parametrize(
    'root, message',
    [
        ('demo:detektion', r'did you mean demo:detection\?'),
        ('demo:', r'must be one of demo:classification, demo:detection'),
        ('demo:detection@9', r'must be 64\.\.512'),
        ('demo:classification@64', r'a size is for demo:detection and demo:segmentation'),
    ],
)
def test_unknown_names_are_one_line(root, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve(root)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('module, name', [('sklearn.datasets', 'classification'), ('pycocotools.mask', 'detection')])
def test_a_missing_extra_names_the_command(module, name, tmp_path, monkeypatch):
    monkeypatch.setenv('DENSEZOO_DATA', str(tmp_path))
    sources.digits.cache_clear()
    sources.split.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r'pip install densezoo\[demo\]'):
        resolve(f'demo:{name}')


def test_missing_photographs_name_the_command(monkeypatch):
    monkeypatch.setitem(sources._PHOTOGRAPHS, 'gone', ('skimage', 'data/gone.png', 'train'))
    with pytest.raises(FileNotFoundError, match=r'gone\.png is not inside the installed skimage'):
        sources.photograph('gone')
    monkeypatch.setitem(sources._PHOTOGRAPHS, 'nowhere', ('no_such_package', 'x.png', 'train'))
    with pytest.raises(MissingExtra, match=r'needs no_such_package: pip install'):
        sources.photograph('nowhere')


# -------------------------------------------------------------------------------------------------- the scenes


@pytest.mark.parametrize('part', sources.SPLITS)
def test_boxes_masks_and_areas_agree(home, coco, part):
    truth = coco[part]
    assert len(truth.imgs) == SMALL[part]
    assert [truth.cats[number]['name'] for number in sorted(truth.cats)] == list('0123456789')
    labels = sources.digits().labels
    for number, image in truth.imgs.items():
        with Image.open(home['detection'] / 'images' / part / image['file_name']) as picture:
            assert picture.size == (image['width'], image['height']) == (96, 96)
            assert picture.mode == 'RGB'
        ids = np.asarray(Image.open(home['segmentation'] / 'masks' / part / image['file_name']))
        painted = np.zeros_like(ids)
        annotations = truth.imgToAnns[number]
        assert 1 <= len(annotations) <= 5
        for ann in annotations:
            mask = truth.annToMask(ann).astype(bool)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert ann['bbox'] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert ann['area'] == mask.sum()
            assert 21 <= ann['bbox'][3] <= 45
            assert ann['category_id'] == labels[ann['digit']] + 1
            assert not painted[mask].any()  # digits never overlap
            painted[mask] = ann['category_id']
        assert (ids == painted).all()


def test_masks_hold_the_pixels_that_are_more_ink_than_ground(monkeypatch):
    monkeypatch.setattr(scenes, '_crop', lambda picture, size, rng: np.full((size, size, 3), 100, dtype=np.uint8))
    compared = 0
    for index in range(20):
        scene = scenes.draw_scene(seed=(6, index), part='val')
        added = scene.image[..., 1].astype(float) - 100
        for digit in scene.digits:
            share = added / added[digit.mask].max()
            near = scenes._dilate(digit.mask, 1) & (np.abs(share - 0.5) > 0.02)  # pixels are rounded to 8 bits
            assert (digit.mask[near] == (share[near] > 0.5)).all()
            compared += near.sum()
    assert compared > 10000


def test_ink_contrasts_with_the_ground():
    contrasts = []
    for index in range(60):
        scene = scenes.draw_scene(seed=(5, index), part='train')
        luminance = scene.image @ np.array([0.299, 0.587, 0.114])
        anything = np.any([digit.mask for digit in scene.digits], axis=0)
        for digit in scene.digits:
            around = scenes._dilate(digit.mask, 4) & ~scenes._dilate(anything, 1)
            if around.any():
                contrasts.append(abs(np.median(luminance[digit.mask]) - np.median(luminance[around])))
    assert len(contrasts) > 150
    assert np.percentile(contrasts, 5) > 70


@pytest.mark.parametrize('height', [22, 44])
def test_glyphs_are_as_tall_as_asked_and_soft_edged(height):
    for scan in range(0, 1797, 60):
        alpha = scenes.glyph(scan, height, slant=0.1)
        assert alpha.min() == 0 and alpha.max() == 1
        tall = np.flatnonzero((alpha > 0.5).any(1))
        assert abs(tall[-1] - tall[0] + 1 - height) <= 2
        assert ((alpha > 0) & (alpha < 1)).mean() < 0.4  # an outline, not a blur


# ------------------------------------------------------------------------------------------------ restoration


def test_validation_crops_are_textured_colour_photographs(home):
    def mean_texture(part):
        files = sorted((home['restoration'] / part).glob('*.png'))
        pictures = [np.asarray(Image.open(file)) for file in files]
        assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures)
        return len(pictures), np.mean([build.texture(picture) for picture in pictures])

    count, textured = mean_texture('val')
    assert 24 <= count <= 40
    photographs = [sources.photograph(name) for name in sources.photograph_names('val')]
    assert textured > 1.2 * np.mean([build.texture(photograph) for photograph in photographs])
    assert mean_texture('train')[0] > 150
