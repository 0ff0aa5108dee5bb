"""CocoDetection: boxes, polygons and run-length masks from a COCO JSON; and the compact records behind it.

What is done with imperfect annotations:
- a box that leaves the image is clipped, one of zero area or wholly outside is dropped; both are counted in one
  warning (`bad_boxes='raise'`: each is a problem).
- problems are: an annotation of an unknown image or category (named), a box that is not four finite numbers, a
  segmentation that cannot be a mask of this image, a duplicate id, a missing file. `on_error='raise'` lists them,
  'skip' drops the annotation (or the image, if it is the image's) with a counted warning.
- a picture whose size is not the JSON's width x height is a DataError at `check` or when it is read.
"""

import functools
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from .base import ImageDataset, OnError
from .errors import DataError
from .imageio import probe, read_image
from .packed import PackedList
from .palettes import distinct_colours
from .paths import expand_root
from .progress import track
from .tensors import InstanceMasks
from .transforms import Sample, TransformSpec

CROWD = 1 << 20  # added to the label of a crowd annotation while transforms select instances
_LAYOUTS = (  # (images, annotations): ours, COCO's own, without a folder, and the export of annotation services
    ('images/{split}', 'annotations/instances_{split}.json'),
    ('{split}2017', 'annotations/instances_{split}2017.json'),
    ('{split}', 'annotations/instances_{split}.json'),
    ('{split}', '{split}/_annotations.coco.json'),
    ('images', 'annotations/{split}.json'),
    ('{split}', '{split}.json'),
)


class CocoDetection(ImageDataset):
    """Detection samples from a COCO JSON: target `boxes` (N, 4) float32 XYXY in pixels, `labels` (N,) int64 in 0..K-1,
    `iscrowd` (N,) int64, `area` (N,) float32 (pixels of the mask if there are masks, else of the box, in the returned
    image), and with masks=True `masks` (N, H, W) bool.

    metainfo: classes, palette, ann_file, category_ids (the JSON's ids in label order; ids are sorted to make labels).

    Args:
        root, split, transforms, seed, on_error: as ImageDataset. Known layouts: images/<split> with
            annotations/instances_<split>.json, COCO's <split>2017, <split>/_annotations.coco.json.
        images, ann_file: folder of pictures and JSON, relative to root (or absolute), where the layout is another.
        masks: read segmentations (needs pycocotools); without, none is ever rasterised.
        classes: names to keep, in the JSON's order; annotations of others are ignored.
        bad_boxes: 'fix' clips and drops with a counted warning, 'raise' makes them problems.
        keep_crowd, keep_empty: crowd annotations, and images without annotations. By default only outside split
            'train...', as detectors are trained.
        exif: rotate by EXIF orientation; False if the annotations were drawn on unrotated pixels.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        masks: bool = False,
        images: str | None = None,
        ann_file: str | None = None,
        classes: Sequence[str] | None = None,
        bad_boxes: Literal['fix', 'raise'] = 'fix',
        keep_crowd: bool | None = None,
        keep_empty: bool | None = None,
        exif: bool = True,
    ) -> None:
        super().__init__(root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._exif = exif
        folder, path = self._locate(images, ann_file)
        self._folder = folder
        self._index(read_json(path), path, masks, classes, bad_boxes, keep_crowd, keep_empty)

    def _locate(
        self, images: str | None, ann_file: str | None, layouts: Sequence[tuple[str, str]] = _LAYOUTS
    ) -> tuple[pathlib.Path, pathlib.Path]:
        filled = [(a.format(split=self.split), b.format(split=self.split)) for a, b in layouts]
        tried = [(images or a, ann_file or b) for a, b in filled]
        for a, b in tried:
            folder, path = self.root / expand_root(a), self.root / expand_root(b)
            if folder.is_dir() and path.is_file():
                return folder, path
        if not self.root.is_dir():
            raise DataError(f'root={str(self.root)!r} is not a folder')
        looked = ', '.join(f'{a} with {b}' for a, b in dict.fromkeys(tried))
        raise DataError(
            f'{type(self).__name__}: no images with annotations for split={self.split!r} in '
            f'root={str(self.root)!r}; looked for {looked}; pass images= and ann_file='
        )

    def _index(
        self,
        data: dict[str, Any],
        path: pathlib.Path,
        masks: bool,
        classes: Sequence[str] | None,
        bad_boxes: str,
        keep_crowd: bool | None,
        keep_empty: bool | None,
    ) -> None:
        if bad_boxes not in ('fix', 'raise'):
            raise ValueError(f"bad_boxes must be 'fix' or 'raise', got {bad_boxes=}")
        training = self.split.startswith('train')
        keep_crowd = not training if keep_crowd is None else keep_crowd
        keep_empty = not training if keep_empty is None else keep_empty
        if masks:
            _pycocotools()
        parsed = _Parsed(data, path, masks, classes, keep_crowd, bad_boxes)
        self._files = PackedList(parsed.files)
        self._ids = np.asarray(parsed.image_ids, dtype=np.int64)
        self._sizes = np.asarray(parsed.sizes, dtype=np.int32).reshape(-1, 2)
        counts = np.asarray([len(rows) for rows in parsed.rows], dtype=np.int64)
        self._ends = np.cumsum(counts)
        flat = [row for rows in parsed.rows for row in rows]
        self._boxes = np.asarray([row[0] for row in flat], dtype=np.float32).reshape(-1, 4)
        self._labels = np.asarray([row[1] + CROWD * row[2] for row in flat], dtype=np.int64)
        self._shapes = PackedList([row[3] for row in rows] for rows in parsed.rows) if masks else None
        names = parsed.names
        self.metainfo = {
            'classes': tuple(names.values()),
            'palette': distinct_colours(len(names)),
            'ann_file': str(path),
            'category_ids': list(names),
        }
        keep = [record for record, count in enumerate(counts) if keep_empty or count]
        present = _listing(self._folder)
        missing = [record for record in keep if not _exists(self._folder, parsed.files[record], present)]
        parsed.problems += [(str(self._folder / parsed.files[record]), 'no such file') for record in missing]
        gone = set(missing)
        self._start(0, parsed.problems, keep=[record for record in keep if record not in gone])
        parsed.warn_of_fixes(stacklevel=4)

    # ---------------------------------------------------------------- ImageDataset

    def file(self, record: int) -> pathlib.Path:
        return self._folder / self._files[record]

    def image_id(self, record: int) -> int:
        return int(self._ids[record])

    def _ratio(self, record: int) -> float:
        height, width = self._sizes[record]
        return float(height / width)

    def inspect(self, record: int) -> None:
        self._check_size(record, *probe(self.file(record), exif=self._exif))

    def read(self, record: int) -> Sample:
        image = read_image(self.file(record), exif=self._exif)
        height, width = int(image.shape[-2]), int(image.shape[-1])
        self._check_size(record, height, width)
        rows = slice(int(self._ends[record - 1]) if record else 0, int(self._ends[record]))
        boxes = torch.from_numpy(self._boxes[rows].copy())
        sample: Sample = {
            'image': tv_tensors.Image(image),
            'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=(height, width)),  # type: ignore[call-overload]
            'labels': torch.from_numpy(self._labels[rows].copy()),
        }
        if self._shapes is not None:
            sample['masks'] = InstanceMasks(self._masks(self._shapes[record], height, width))
        return sample

    def finish(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        """Plain tensors; instances whose box or mask has vanished under the transforms are left out."""
        image = sample['image'].as_subclass(Tensor)
        boxes = sample['boxes'].as_subclass(Tensor)
        labels = sample['labels']
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = (sides > 0).all(dim=1)
        area = sides.prod(dim=1)
        masks = None
        if 'masks' in sample:
            masks = sample['masks'].as_subclass(Tensor)
            masks = masks.bool()
            area = torch.tensor([float(np.count_nonzero(mask)) for mask in masks.numpy()])
            keep &= area > 0
        if not bool(keep.all()):
            boxes, labels, area = boxes[keep], labels[keep], area[keep]
            masks = None if masks is None else masks[keep]
        crowd = labels >= CROWD
        target = {'boxes': boxes, 'labels': labels - CROWD * crowd, 'iscrowd': crowd.long(), 'area': area}
        if masks is not None:
            target['masks'] = masks
        return image, target

    def _check_size(self, record: int, height: int, width: int) -> None:
        expected = tuple(int(edge) for edge in self._sizes[record])
        if (height, width) != expected:
            turned = '; it looks rotated by EXIF: annotations drawn on unrotated pixels need exif=False'
            hint = turned if (width, height) == expected and self._exif else ''
            raise DataError(
                f'{self.file(record)}: the picture is {width}x{height}, but the annotations say '
                f'{expected[1]}x{expected[0]}{hint}'
            )

    def _masks(self, shapes: list[Any], height: int, width: int) -> Tensor:
        if not shapes:
            return torch.zeros(0, height, width, dtype=torch.uint8)
        lengths = [run_lengths(shape, height, width) for shape in shapes]
        decoded = _pycocotools().decode(lengths)  # (H, W, N), first index fastest
        return _rows_first(decoded)


def _rows_first(decoded: np.ndarray) -> Tensor:
    """(H, W, N) with the rows running fastest, as pycocotools makes it -> contiguous (N, H, W)."""
    cv2 = _opencv()
    if cv2 is None:
        return torch.from_numpy(decoded).permute(2, 0, 1).contiguous()
    masks = np.empty((decoded.shape[2], *decoded.shape[:2]), dtype=np.uint8)
    for number, mask in enumerate(masks):
        cv2.transpose(decoded[:, :, number].T, mask)  # ten times as fast as torch's or numpy's copy
    return torch.from_numpy(masks)


def run_lengths(shape: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run lengths of a segmentation: a list of polygons, or run lengths with a list or bytes."""
    coco_mask = _pycocotools()
    if isinstance(shape, list):
        return coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    if isinstance(shape['counts'], list):
        return coco_mask.frPyObjects(shape, height, width)
    return shape


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A COCO JSON; DataError if it is none."""
    try:
        with open(path, encoding='utf-8') as file:
            data = json.load(file)
    except OSError as error:
        raise DataError(f'{path}: cannot be read ({error.strerror or error})') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f'{path}: is not JSON ({error})') from None
    for key in ('images', 'categories'):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f'{path}: a COCO file needs a list {key!r}')
    return data


class _Parsed:
    """Lists per image made from the JSON: files, ids, sizes, rows of (box, label, crowd, segmentation)."""

    def __init__(
        self,
        data: dict[str, Any],
        path: pathlib.Path,
        masks: bool,
        classes: Sequence[str] | None,
        keep_crowd: bool,
        bad_boxes: str,
    ) -> None:
        self._path, self._masks, self._raise_boxes = path, masks, bad_boxes == 'raise'
        self.problems: list[tuple[str, str]] = []
        self.clipped: list[str] = []
        self.dropped: list[str] = []
        every = {int(category['id']): str(category['name']) for category in data['categories']}
        self.names = {number: every[number] for number in sorted(every) if classes is None or every[number] in classes}
        for name in classes or ():
            if name not in every.values():
                raise DataError(f'classes names {name!r}, but {path} has {", ".join(every.values())}')
        self.files: list[str] = []
        self.image_ids: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        place = self._images(data['images'])
        self.rows: list[list[tuple[list[float], int, int, Any]]] = [[] for _ in self.files]
        labels = {number: label for label, number in enumerate(self.names)}
        seen: set[Any] = set()
        for annotation in track(data.get('annotations') or [], f'reading {path.name}'):
            record = place.get(annotation.get('image_id'))
            name = f'annotation {annotation.get("id")}'
            if record is None:
                what = f'{name} is of image_id {annotation.get("image_id")}, which is unknown'
                self.problems.append((str(path), what))
                continue
            if annotation.get('id') is not None:
                if annotation['id'] in seen:
                    self.problems.append((self.files[record], f'{name}: its id is used twice'))
                    continue
                seen.add(annotation['id'])
            category = annotation.get('category_id')
            if category not in every:
                known = ', '.join(map(str, sorted(every)))
                self.problems.append((self.files[record], f'{name} has category_id {category}, not one of {known}'))
                continue
            crowd = int(bool(annotation.get('iscrowd', 0)))
            if category not in labels or (crowd and not keep_crowd):
                continue
            box = self._box(annotation, record, name)
            if box is None:
                continue
            shape = self._shape(annotation, record, name) if masks else None
            if masks and shape is None:
                continue
            self.rows[record].append((box, labels[category], crowd, shape))

    def _images(self, images: list[dict[str, Any]]) -> dict[Any, int]:
        place: dict[Any, int] = {}
        for image in images:
            file, number = image.get('file_name'), image.get('id')
            if not isinstance(file, str) or not isinstance(number, int):
                self.problems.append((str(self._path), f'image {number!r} needs an integer id and a file_name'))
            elif number in place:
                self.problems.append((file, f'image id {number} is used twice'))
            elif not (_positive(image.get('width')) and _positive(image.get('height'))):
                self.problems.append(
                    (
                        file,
                        f'width and height must be positive integers, got {image.get("width")!r} '
                        f'and {image.get("height")!r}',
                    )
                )
            else:
                place[number] = len(self.files)
                self.files.append(file)
                self.image_ids.append(number)
                self.sizes.append((int(image['height']), int(image['width'])))
        return place

    def _box(self, annotation: dict[str, Any], record: int, name: str) -> list[float] | None:
        given = annotation.get('bbox')
        file = self.files[record]
        try:
            x, y, w, h = map(float, given)  # type: ignore[arg-type]
            finite = bool(np.isfinite([x, y, w, h]).all())
        except (TypeError, ValueError):
            finite = False
        if not finite:
            self.problems.append((file, f'{name}: bbox must be four finite numbers (x, y, width, height), got {given}'))
            return None
        height, width = self.sizes[record]
        corners = zip((x, y, x + w, y + h), (width, height) * 2)
        box = [min(max(edge, 0.0), float(limit)) for edge, limit in corners]
        what = f'bbox {given} in a picture of {width}x{height}'
        if box[2] <= box[0] or box[3] <= box[1]:
            why = 'has zero area' if w <= 0 or h <= 0 else 'lies outside the picture'
            self._fault(self.dropped, file, f'{name}: {what} {why}')
            return None
        if max(box[0] - x, box[1] - y, x + w - box[2], y + h - box[3]) > 1.0:  # less is rounding
            self._fault(self.clipped, file, f'{name}: {what} leaves the picture')
            return None if self._raise_boxes else box
        return box

    def _fault(self, fixes: list[str], file: str, reason: str) -> None:
        if self._raise_boxes:
            self.problems.append((file, reason))
        else:
            fixes.append(f'{file}: {reason}')

    def _shape(self, annotation: dict[str, Any], record: int, name: str) -> Any:
        given = annotation.get('segmentation')
        height, width = self.sizes[record]
        reason = 'segmentation must be polygons or run lengths'
        if isinstance(given, list):
            polygons = [p for p in given if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
            if polygons:
                return polygons
            reason = 'segmentation has no polygon of at least three points'
        elif isinstance(given, dict) and isinstance(given.get('counts'), (list, str, bytes)):
            counts, size = given['counts'], list(given.get('size') or ())
            if size != [height, width]:
                reason = f'mask of another size: segmentation has size {size}, the picture [{height}, {width}]'
            elif isinstance(counts, list) and sum(counts) != height * width:
                reason = f'run lengths sum to {sum(counts)}, not to {height} x {width}'
            else:
                counts = counts.encode() if isinstance(counts, str) else counts
                return {'size': size, 'counts': counts}
        self.problems.append((self.files[record], f'{name}: {reason}'))
        return None

    def warn_of_fixes(self, stacklevel: int) -> None:
        if self.dropped or self.clipped:
            first = (self.dropped or self.clipped)[0]
            warnings.warn(
                f'{self._path}: {len(self.dropped)} boxes of zero area or outside the picture dropped, '
                f'{len(self.clipped)} clipped at its border; first: {first}',
                stacklevel=stacklevel,
            )


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _listing(folder: pathlib.Path) -> set[str]:
    """Names directly in a folder: one system call, where asking for each file would be a hundred thousand."""
    return {entry.name for entry in os.scandir(folder)}


def _exists(folder: pathlib.Path, file: str, present: set[str]) -> bool:
    return file in present or ('/' in file and (folder / file).is_file())


@functools.cache
def _opencv() -> Any:
    """cv2, or None where it or a system library that it links is missing; imported when the first mask is read."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


@functools.cache
def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError('masks need pycocotools: pip install densezoo[train]') from None
    return mask
