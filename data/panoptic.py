"""Universal targets from disk: every pixel has a class and every object a mask, in one space of K classes.

The target of both readers: CocoDetection's `boxes`, `labels`, `masks`, `iscrowd`, `area` of the objects, and `mask`
(H, W) int64 with the class of every pixel, objects included, 255 where nothing is known. `labels` and `mask` use the
same ids 0..K-1; metainfo has `classes` and `palette` of all K and `things`, the ids of those that are objects. For
CocoMetric, `category_ids` has K entries too, None for stuff.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torchvision import tv_tensors

from .base import ImageDataset, OnError
from .coco import CROWD, CocoDetection, read_json
from .errors import DataError
from .imageio import probe, read_image, read_mask
from .masks import MaskFolder
from .packed import PackedList
from .palettes import distinct_colours
from .paths import expand_root
from .tensors import IGNORE, InstanceMasks, SemanticMask
from .transforms import Sample, TransformSpec, boxes_of_masks

_LAYOUTS = (  # (images, annotations); the PNGs lie in a folder called as the JSON
    ('{split}2017', 'annotations/panoptic_{split}2017.json'),
    ('images/{split}', 'annotations/panoptic_{split}.json'),
)


class _Universal(CocoDetection):
    """Objects as CocoDetection has them, and 'mask' in the sample for the semantic map."""

    def finish(self, sample: Sample) -> tuple[torch.Tensor, dict[str, Any]]:
        image, target = super().finish(sample)
        return image, target | {'mask': sample['mask'].as_subclass(torch.Tensor).long()}


class PanopticFolder(_Universal):
    """Pictures with a COCO JSON of their objects and a folder of semantic masks of the same names.

    The JSON's categories are things, and each must bear the name of one of the masks' classes; the other classes are
    stuff. 'demo:segmentation' is such a folder: ten digits on the background.

    Args:
        root, split, transforms, seed, on_error, images, ann_file, bad_boxes, keep_crowd, exif: as CocoDetection.
        masks: folder of the semantic masks, relative to root, where it is not masks/<split>.
        classes, palette: of the masks, as MaskFolder.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        images: str | None = None,
        masks: str | None = None,
        ann_file: str | None = None,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        bad_boxes: Literal['fix', 'raise'] = 'fix',
        keep_crowd: bool | None = None,
        exif: bool = True,
    ) -> None:
        super().__init__(
            root=root,
            split=split,
            transforms=transforms,
            seed=seed,
            on_error=on_error,
            masks=True,
            images=images,
            ann_file=ann_file,
            bad_boxes=bad_boxes,
            keep_crowd=keep_crowd,
            keep_empty=True,
            exif=exif,
        )
        self._semantic = MaskFolder(
            root=self.root,
            split=split,
            on_error=on_error,
            classes=classes,
            palette=palette,
            images=str(self._folder),
            masks=masks,
            exif=exif,
        )
        self._mask_of = {self._semantic.file(record): record for record in range(len(self._semantic))}
        names = list(self._semantic.metainfo['classes'])
        categories = self.metainfo['category_ids']
        for name in self.metainfo['classes']:
            if name not in names:
                raise DataError(
                    f'{self.metainfo["ann_file"]}: category {name!r} is not a class of the masks: {", ".join(names)}'
                )
        self._class_of = torch.tensor([names.index(name) for name in self.metainfo['classes']], dtype=torch.int64)
        self.metainfo |= self._semantic.metainfo
        self.metainfo['things'] = tuple(sorted(self._class_of.tolist()))
        category_of = dict(zip(self._class_of.tolist(), categories))
        self.metainfo['category_ids'] = [category_of.get(label) for label in range(len(names))]
        keep, problems = [], []
        for record in self._records.tolist():
            if self.file(record) in self._mask_of:
                keep.append(record)
            else:
                problems.append((str(self.file(record)), 'has no semantic mask'))
        self._start(0, problems, keep=keep)

    def inspect(self, record: int) -> None:
        super().inspect(record)
        self._semantic.inspect(self._mask_of[self.file(record)])

    def read(self, record: int) -> Sample:
        sample = super().read(record)
        labels = sample['labels']
        sample['labels'] = self._class_of[labels % CROWD] + labels // CROWD * CROWD
        sample['mask'] = self._semantic.mask(self._mask_of[self.file(record)])
        if sample['mask'].shape != sample['image'].shape[-2:]:
            raise DataError(
                f'{self.file(record)}: mask of another size: {tuple(sample["mask"].shape)} for a picture of '
                f'{tuple(sample["image"].shape[-2:])}'
            )
        return sample


class CocoPanoptic(_Universal):
    """COCO's panoptic format: a JSON of segments, and per picture a PNG whose R + 256 G + 65536 B is a segment's id.

    Classes are all categories in the order of their ids; id 0 in the PNG is unknown. Images whose ids are names, as in
    ADE20K's conversion, are numbered from 1. Where instances_<split>.json lies beside, it becomes the `ann_file` of
    CocoMetric.

    Args:
        root, split, transforms, seed, on_error, keep_crowd, exif: as CocoDetection.
        images, ann_file: folder of pictures and JSON, relative to root, where the layout is not COCO's own.
        segmentations: folder of the PNGs; that of the JSON's name without .json if None.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        images: str | None = None,
        ann_file: str | None = None,
        segmentations: str | None = None,
        keep_crowd: bool | None = None,
        exif: bool = True,
    ) -> None:
        ImageDataset.__init__(self, root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._exif = exif
        self._folder, path = self._locate(images, ann_file, layouts=_LAYOUTS)
        self._pngs = self.root / expand_root(segmentations) if segmentations else path.with_suffix('')
        data = _numbered(read_json(path))
        # The pictures as CocoDetection indexes them; segments have no boxes that could be wrong.
        self._index(data | {'annotations': []}, path, False, None, 'fix', None, True)
        categories = sorted(data['categories'], key=lambda category: category['id'])
        numbers = {int(category['id']): label for label, category in enumerate(categories)}
        self._keep_crowd = not split.startswith('train') if keep_crowd is None else keep_crowd
        instances = path.with_name(path.name.replace('panoptic_', 'instances_'))
        things = tuple(label for label, category in enumerate(categories) if category.get('isthing', 1))
        self.metainfo = {
            'classes': tuple(str(category['name']) for category in categories),
            'palette': [tuple(c['color']) for c in categories]
            if all('color' in c for c in categories)
            else distinct_colours(len(categories)),
            'things': things,
            'category_ids': [number if label in things else None for number, label in numbers.items()],
        }
        if instances != path and instances.is_file():
            self.metainfo['ann_file'] = str(instances)
        self._thing = np.isin(np.arange(len(categories)), things)
        self._segments_of(data.get('annotations') or [], numbers, path)

    def _segments_of(self, annotations: list[dict[str, Any]], numbers: Mapping[int, int], path: pathlib.Path) -> None:
        """Per record the PNG's name and its segments: (id, class, crowd)."""
        place = {int(number): record for record, number in enumerate(self._ids)}
        listed: list[tuple[str, list[tuple[int, int, int]]] | None] = [None] * len(self._ids)
        problems = []
        for annotation in annotations:
            record = place.get(annotation.get('image_id', -1))
            if record is None:
                problems.append((str(path), f'an annotation is of image_id {annotation.get("image_id")}, unknown'))
                continue
            rows = []
            for segment in annotation.get('segments_info', ()):
                if segment['category_id'] not in numbers:
                    name = f'segment {segment["id"]} has category_id {segment["category_id"]}'
                    problems.append((annotation['file_name'], f'{name}, not one of {", ".join(map(str, numbers))}'))
                    continue
                crowd = int(bool(segment.get('iscrowd', 0)))
                rows.append((int(segment['id']), numbers[segment['category_id']], crowd))
            listed[record] = (annotation['file_name'], rows)
        records = self._records.tolist()
        problems += [(str(self.file(record)), 'has no segments') for record in records if listed[record] is None]
        self._listed = PackedList(listed)
        self._start(0, problems, keep=[record for record in records if listed[record] is not None])

    def inspect(self, record: int) -> None:
        super().inspect(record)
        self._check_size(record, *probe(self._pngs / self._listed[record][0], exif=False))

    def read(self, record: int) -> Sample:
        image = read_image(self.file(record), exif=self._exif)
        height, width = int(image.shape[-2]), int(image.shape[-1])
        self._check_size(record, height, width)
        name, rows = self._listed[record]
        colours = read_mask(self._pngs / name, exif=False).astype(np.int64)
        if colours.shape != (height, width, 3):
            raise DataError(f'{self._pngs / name}: must be RGB of {width}x{height}, got an array {colours.shape}')
        ids = colours @ (1, 256, 65536)
        known = {0: IGNORE} | {number: label for number, label, _ in rows}
        values, positions = np.unique(ids, return_inverse=True)
        if stranger := [value for value in values.tolist() if value not in known]:
            raise DataError(f'{self._pngs / name}: segment id {stranger[0]} is not in the JSON')
        mask = np.array([known[value] for value in values.tolist()], dtype=np.uint8)[positions].reshape(ids.shape)
        objects = [
            (number, label + CROWD * crowd)
            for number, label, crowd in rows
            if self._thing[label] and (self._keep_crowd or not crowd)
        ]
        masks = torch.from_numpy(ids)[None] == torch.tensor([number for number, _ in objects]).reshape(-1, 1, 1)
        boxes = boxes_of_masks(masks)
        return {
            'image': tv_tensors.Image(image),
            'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=(height, width)),  # type: ignore[call-overload]
            'labels': torch.tensor([label for _, label in objects], dtype=torch.int64),
            'masks': InstanceMasks(masks.to(torch.uint8)),
            'mask': SemanticMask(torch.from_numpy(mask)),
        }


def _numbered(data: dict[str, Any]) -> dict[str, Any]:
    """The same with whole numbers for images where their ids are names, as converters of other datasets write them."""
    images = data['images']
    if all(isinstance(image.get('id'), int) for image in images):
        return data
    numbers = {image.get('id'): number for number, image in enumerate(images, 1)}
    annotations = data.get('annotations') or []
    return data | {
        'images': [{**image, 'id': number} for number, image in enumerate(images, 1)],
        'annotations': [{**one, 'image_id': numbers.get(one.get('image_id'), -1)} for one in annotations],
    }
