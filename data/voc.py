"""PASCAL VOC's layout: JPEGImages, Annotations (XML), SegmentationClass (palette PNG) and ImageSets.

The XMLs are turned into one COCO JSON under densezoo's data folder, from which samples and evaluation are read.
Boxes in VOC count pixels from 1 and include the last one: (xmin, ymin, xmax, ymax) becomes (xmin - 1, ymin - 1, xmax,
ymax) in pixel edges. `difficult` objects become crowd annotations: no training target, and neither hit nor miss.
"""

import hashlib
import json
import os
import pathlib
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any, Literal

from .base import ImageDataset, OnError
from .coco import CocoDetection
from .errors import DataError
from .masks import MaskFolder
from .palettes import VOC_CLASSES, voc_colour
from .paths import data_home
from .progress import track
from .transforms import TransformSpec


class VOCDetection(CocoDetection):
    """Detection samples from VOC's XMLs; the target is CocoDetection's, without masks.

    Args:
        root, split, transforms, seed, on_error, bad_boxes, keep_crowd, keep_empty: as CocoDetection. root holds
            JPEGImages, or VOCdevkit/VOC<year> or VOC<year> with it; split names a file of ImageSets/Main.
        year: '2007' or '2012', where root holds several.
        classes: in label order; the 20 of VOC by default. An object of another class is a problem.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        year: str | None = None,
        classes: Sequence[str] = VOC_CLASSES,
        bad_boxes: Literal['fix', 'raise'] = 'fix',
        keep_crowd: bool | None = None,
        keep_empty: bool | None = None,
    ) -> None:
        ImageDataset.__init__(self, root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._exif = True
        home = _home(self.root, year)
        self._folder = home / 'JPEGImages'
        data, problems = _as_coco(home, _image_set(home / 'ImageSets' / 'Main', split), tuple(classes))
        if problems:
            self._report(problems)
        path = _save(data, home, split)
        self._index(data, path, False, None, bad_boxes, keep_crowd, keep_empty)


class VOCSegmentation(MaskFolder):
    """Semantic masks from VOC's SegmentationClass: 21 classes with background, 255 on contours.

    Args: root, split, transforms, seed, on_error as MaskFolder; split names a file of ImageSets/Segmentation; year as
    in VOCDetection; classes: names from id 0 on, ('background',) + the 20 of VOC by default.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        year: str | None = None,
        classes: Sequence[str] = ('background', *VOC_CLASSES),
    ) -> None:
        ImageDataset.__init__(self, root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._exif = True
        home = _home(self.root, year)
        self._pictures, self._partners = home / 'JPEGImages', home / 'SegmentationClass'
        pairs, problems = [], []
        for name in _image_set(home / 'ImageSets' / 'Segmentation', split):
            image, mask = _picture(self._pictures, name), f'{name}.png'
            if image is None:
                problems.append((str(self._pictures / f'{name}.jpg'), 'no such file'))
            elif not (self._partners / mask).is_file():
                problems.append((str(self._pictures / image), f'has no mask {self._partners / mask}'))
            else:
                pairs.append((image, mask))
        palette = [voc_colour(number) for number in range(len(classes))]
        self._begin(pairs, problems, classes, palette, None, False)


def _home(root: pathlib.Path, year: str | None) -> pathlib.Path:
    years = [year] if year else ['2012', '2007']
    places = [root] + [root / part / f'VOC{y}' for y in years for part in ('', 'VOCdevkit')]
    for place in places[bool(year) and not (root / 'JPEGImages').is_dir() :]:
        if (place / 'JPEGImages').is_dir():
            return place
    raise DataError(
        f'root={str(root)!r} holds no JPEGImages, nor does VOC<year> or VOCdevkit/VOC<year> in it ({year=})'
    )


def _image_set(folder: pathlib.Path, split: str) -> list[str]:
    path = folder / f'{split}.txt'
    if not path.is_file():
        known = ', '.join(sorted(file.stem for file in folder.glob('*.txt'))) or 'none'
        raise DataError(f'split={split!r}: no file {path}; there are: {known}')
    return [line.split()[0] for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]


def _picture(folder: pathlib.Path, name: str) -> str | None:
    for suffix in ('.jpg', '.jpeg', '.png', '.JPG'):
        if (folder / (name + suffix)).is_file():
            return name + suffix
    return None


def _as_coco(
    home: pathlib.Path, names: Sequence[str], classes: tuple[str, ...]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A COCO dictionary of the XMLs of `names`, and what is wrong with some of them."""
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    problems: list[tuple[str, str]] = []
    for number, name in enumerate(track(names, 'reading VOC annotations'), start=1):
        path = home / 'Annotations' / f'{name}.xml'
        try:
            tree = ElementTree.parse(path).getroot()
            size = {key: int(float(tree.findtext(f'size/{key}', '0'))) for key in ('width', 'height')}
            file = _picture(home / 'JPEGImages', name) or f'{name}.jpg'
            images.append({'id': number, 'file_name': file, **size})
            for item in tree.iter('object'):
                kind = item.findtext('name', '').strip()
                if kind not in numbers:
                    problems.append((str(path), f'object {kind!r} is not one of the {len(classes)} classes'))
                    continue
                edges = (item.findtext(f'bndbox/{edge}', 'nan') for edge in ('xmin', 'ymin', 'xmax', 'ymax'))
                x1, y1, x2, y2 = map(float, edges)
                width, height = x2 - x1 + 1, y2 - y1 + 1
                annotations.append({
                    'id': len(annotations) + 1, 'image_id': number, 'category_id': numbers[kind],
                    'bbox': [x1 - 1, y1 - 1, width, height], 'area': width * height,
                    'iscrowd': int(item.findtext('difficult', '0').strip() or 0)})  # fmt: skip
        except FileNotFoundError:
            problems.append((str(path), 'no such file'))
        except (ElementTree.ParseError, ValueError) as error:
            problems.append((str(path), f'is not a VOC annotation ({error})'))
    categories = [{'id': number, 'name': name} for name, number in numbers.items()]
    return {'images': images, 'annotations': annotations, 'categories': categories}, problems


def _save(data: dict[str, Any], home: pathlib.Path, split: str) -> pathlib.Path:
    """Writes the JSON once, atomically, under a name made from its content."""
    text = json.dumps(data)
    digest = hashlib.sha256(f'{home.resolve()}{text}'.encode()).hexdigest()[:16]
    path = data_home() / 'voc' / f'{split}-{digest}.json'
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            file.write(text)
        os.replace(name, path)
    return path
