"""Semantic segmentation from folders of pictures and masks, with the layouts of ADE20K and Cityscapes.

A mask holds class ids in one channel, or palette indices (as VOC's PNGs), or colours of the palette. Ids go through a
label map to 0..K-1 and 255 (ignore); an id that the map does not know is a DataError that names the file and the id.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from .base import OnError
from .errors import DataError
from .imageio import read_image, read_mask
from .pairs import PairedImages, Pairs, Problems, match
from .palettes import (
    ADE20K_CLASSES,
    ADE20K_PALETTE,
    CITYSCAPES_CLASSES,
    CITYSCAPES_PALETTE,
    CITYSCAPES_TRAIN_IDS,
    Colour,
    distinct_colours,
)
from .paths import expand_root, first_folder, list_images
from .tensors import IGNORE, SemanticMask
from .transforms import Sample, TransformSpec

_UNKNOWN = 254  # what an id without a class becomes for a moment
_MASK_SUFFIXES = ('.png', '.tif', '.tiff', '.bmp', '.gif')


class MaskFolder(PairedImages):
    """Pictures and masks of the same names; target `mask` (H, W) int64 with ids 0..K-1 and 255 = ignore.

    Looks for images/<split> with masks/<split>, <split>/images with <split>/masks, and images with masks for split=''.

    Args:
        root, split, transforms, seed, on_error: as ImageDataset.
        classes: names in id order; by default those of root/classes.json ({"classes": [...], "palette": [[r, g, b]]})
            or root/classes.txt (one per line).
        palette: colours in id order; also the meaning of masks that are stored in colour.
        images, masks: the two folders relative to root, where the layout is another.
        image_suffix, mask_suffix: ends of the names that are exchanged, as '_leftImg8bit.png' and
            '_gtFine_labelIds.png'; by default the file suffixes, whatever they are.
        label_map: {stored id: class id or 255}. Ids that are not in it are errors.
        reduce_zero_label: stored 0 means ignore, 1..K the classes.
        exif: rotate pictures and masks by EXIF orientation.
    """

    partner = 'mask'

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        images: str | None = None,
        masks: str | None = None,
        image_suffix: str = '',
        mask_suffix: str = '',
        label_map: Mapping[int, int] | None = None,
        reduce_zero_label: bool = False,
        exif: bool = True,
    ) -> None:
        super().__init__(root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._exif = exif
        self._pictures = first_folder(self.root, _places('images', split, images), 'images')
        self._partners = first_folder(self.root, _places('masks', split, masks), 'masks')
        names = list_images(self._partners, mask_suffix)
        if not mask_suffix:
            names = [name for name in names if name.lower().endswith(_MASK_SUFFIXES)]
        pairs, problems = match(
            self._pictures, self._partners, names, partner=self.partner, suffixes=(image_suffix, mask_suffix)
        )
        self._begin(pairs, problems, classes, palette, label_map, reduce_zero_label)

    def _begin(
        self,
        pairs: Pairs,
        problems: Problems,
        classes: Sequence[str] | None,
        palette: Sequence[Sequence[int]] | None,
        label_map: Mapping[int, int] | None,
        reduce_zero_label: bool,
    ) -> None:
        names, colours = _meaning(self.root, classes, palette)
        if len(names) >= _UNKNOWN:
            raise ValueError(f'classes must be fewer than {_UNKNOWN}, got {len(names)}')
        if len(colours) != len(names):
            raise ValueError(f'palette must have one colour per class, got {len(colours)} for {len(names)} classes')
        self.metainfo = {'classes': names, 'palette': colours}
        self._pairs = pairs
        self._table = _table(len(names), label_map, reduce_zero_label)
        self._colours = np.asarray(colours, dtype=np.int64).reshape(-1, 3) @ (65536, 256, 1)
        self._start(len(pairs), problems)

    def read(self, record: int) -> Sample:
        image, mask = read_image(self.file(record), exif=self._exif), self.mask(record)
        self._same_size(record, image.shape, mask.shape)
        return {'image': tv_tensors.Image(image), 'mask': mask}

    def mask(self, record: int) -> SemanticMask:
        """Class ids (H, W) of a record, without its picture."""
        return SemanticMask(torch.from_numpy(self._ids(self.partner_file(record))))

    def finish(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        return sample['image'].as_subclass(Tensor), {'mask': sample['mask'].as_subclass(Tensor).long()}

    def _ids(self, path: pathlib.Path) -> np.ndarray:
        """Class ids (H, W) uint8 of a mask file."""
        stored = read_mask(path, exif=self._exif)
        if stored.ndim == 3:
            return self._from_colours(stored, path)
        if stored.dtype == np.uint8:
            mask = self._table[stored]
        else:
            wide = (stored < 0) | (stored > 255)
            mask = np.where(wide, _UNKNOWN, self._table[np.clip(stored, 0, 255)]).astype(np.uint8)
        unknown = mask == _UNKNOWN
        if unknown.any():
            found = ', '.join(map(str, np.unique(stored[unknown])[:5]))
            allowed = np.flatnonzero(self._table != _UNKNOWN)
            raise DataError(
                f'{path}: class id {found} is not in the {len(self.metainfo["classes"])} classes '
                f'(allowed in the file: {_ranges(allowed)})'
            )
        return mask

    def _from_colours(self, stored: np.ndarray, path: pathlib.Path) -> np.ndarray:
        codes = stored.astype(np.int64) @ (65536, 256, 1)
        if (stored[..., 0] == stored[..., 1]).all() and (stored[..., 0] == stored[..., 2]).all():
            grey = self._table[stored[..., 0]]  # ids saved as grey RGB
            if (grey != _UNKNOWN).all():
                return grey
        mask = np.full(codes.shape, _UNKNOWN, dtype=np.uint8)
        for number, code in enumerate(self._colours):
            mask[codes == code] = number
        if (mask == _UNKNOWN).any():
            code = int(codes[mask == _UNKNOWN][0])
            colour = (code >> 16, code >> 8 & 255, code & 255)
            raise DataError(
                f'{path}: colour {colour} is not in the palette of {len(self._colours)} classes; pass '
                'palette= or store class ids in one channel'
            )
        return mask


class ADE20K(MaskFolder):
    """ADE20K's scene parsing challenge (ADEChallengeData2016): 150 classes, stored 0 is ignored.

    Args: as MaskFolder; split is 'train' or 'val' (the folders training and validation).
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
    ) -> None:
        folder = {'train': 'training', 'val': 'validation'}.get(split, split)
        super().__init__(
            root=root,
            split=split,
            transforms=transforms,
            seed=seed,
            on_error=on_error,
            classes=ADE20K_CLASSES,
            palette=ADE20K_PALETTE,
            images=f'images/{folder}',
            masks=f'annotations/{folder}',
            reduce_zero_label=True,
        )


class Cityscapes(MaskFolder):
    """Cityscapes' fine annotations: leftImg8bit/<split>/<city>, gtFine/<split>/<city>; 19 classes.

    The labelIds of the masks become trainIds; the other ids are ignored.

    Args: as MaskFolder; split is 'train', 'val' or 'test'.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
    ) -> None:
        super().__init__(
            root=root,
            split=split,
            transforms=transforms,
            seed=seed,
            on_error=on_error,
            classes=CITYSCAPES_CLASSES,
            palette=CITYSCAPES_PALETTE,
            images=f'leftImg8bit/{split}',
            masks=f'gtFine/{split}',
            image_suffix='_leftImg8bit.png',
            mask_suffix='_gtFine_labelIds.png',
            label_map=CITYSCAPES_TRAIN_IDS,
        )


def _places(kind: str, split: str, given: str | None) -> list[str]:
    if given is not None:
        return [str(expand_root(given))]
    return [f'{kind}/{split}', f'{split}/{kind}'] if split else [kind]


def _meaning(
    root: pathlib.Path, classes: Sequence[str] | None, palette: Sequence[Sequence[int]] | None
) -> tuple[tuple[str, ...], list[Colour]]:
    if classes is None and (root / 'classes.json').is_file():
        try:
            stored = json.loads((root / 'classes.json').read_text(encoding='utf-8'))
            classes, palette = stored['classes'], palette or stored.get('palette')
        except (ValueError, KeyError, TypeError):
            form = '{"classes": [...], "palette": [[r, g, b], ...]}'
            raise DataError(f'{root / "classes.json"}: must be {form}') from None
    elif classes is None and (root / 'classes.txt').is_file():
        lines = (root / 'classes.txt').read_text(encoding='utf-8').splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    if not classes:
        raise DataError(
            f'the names of the classes are needed: pass classes=(...), or write them, one per line in id '
            f'order, into {root / "classes.txt"}'
        )
    colours = [(int(r), int(g), int(b)) for r, g, b in palette] if palette else distinct_colours(len(classes))
    return tuple(str(name) for name in classes), colours


def _table(count: int, label_map: Mapping[int, int] | None, reduce_zero_label: bool) -> np.ndarray:
    """What each stored byte becomes: 0..K-1, 255 or _UNKNOWN."""
    table = np.full(256, _UNKNOWN, dtype=np.uint8)
    if label_map is not None:
        for stored, number in label_map.items():
            if not (0 <= int(stored) <= 255 and (0 <= number < count or number == IGNORE)):
                raise ValueError(f'label_map must map 0..255 to 0..{count - 1} or 255, got {stored}: {number}')
            table[int(stored)] = number
        return table
    first = 1 if reduce_zero_label else 0
    table[first : first + count] = np.arange(count)
    table[0] = IGNORE if reduce_zero_label else 0
    table[IGNORE] = IGNORE
    return table


def _ranges(numbers: np.ndarray) -> str:
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ', '.join(f'{run[0]}..{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)
