"""Tiny datasets of real photographs, written by the tests that read them."""

import json
import pathlib

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image


@pytest.fixture(scope='session')
def photograph() -> np.ndarray:
    """(213, 320, 3) uint8: a real picture that no flip or rotation leaves as it is."""
    return sklearn.datasets.load_sample_image('china.jpg')[::2, ::2].copy()


@pytest.fixture
def save(tmp_path, photograph):
    """save('a/b.png', height=60, width=80) writes a crop of the photograph below tmp_path and returns the path."""

    def write(name: str, *, height: int = 60, width: int = 80, pixels=None, **options) -> pathlib.Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        array = photograph[40 : 40 + height, 30 : 30 + width] if pixels is None else pixels
        Image.fromarray(array).save(path, **options)
        return path

    return write


def disc(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    """Boolean mask of a disc."""
    rows, columns = np.mgrid[:height, :width]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def polygon(row: float, column: float, radius: float, points: int = 24) -> list[float]:
    """x0, y0, x1, y1, ... of a regular polygon."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([column + radius * np.cos(angles), row + radius * np.sin(angles)], axis=1).ravel().tolist()


@pytest.fixture
def coco(tmp_path, save):
    """coco(annotations=[...], ...) writes a COCO dataset of PNGs and returns its root. Each annotation may leave out
    everything; `row`, `column`, `radius` make a polygon and its box."""

    def write(
        annotations=(),
        *,
        images: int = 4,
        split: str = 'train',
        categories=((3, 'cat'), (7, 'dog')),
        height: int = 60,
        width: int = 80,
        **changes,
    ) -> pathlib.Path:
        listed = []
        for number in range(images):
            save(f'images/{split}/{number}.png', height=height, width=width)
            listed.append({'id': 100 + number, 'file_name': f'{number}.png', 'height': height, 'width': width})
        written = []
        for number, given in enumerate(annotations):
            row, column, radius = given.get('row', 30), given.get('column', 40), given.get('radius', 12)
            full = {
                'id': number + 1,
                'image_id': 100,
                'category_id': 7,
                'iscrowd': 0,
                'bbox': [column - radius, row - radius, 2 * radius, 2 * radius],
                'segmentation': [polygon(row, column, radius)],
            }
            written.append(full | {key: value for key, value in given.items() if key in full})
        data = {
            'images': listed,
            'annotations': written,
            'categories': [{'id': number, 'name': name} for number, name in categories],
        } | changes
        path = tmp_path / 'annotations' / f'instances_{split}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        return tmp_path

    write.disc, write.polygon = disc, polygon
    return write
