"""ImageFolder: pictures sorted into one folder per class."""

import difflib
import os
from collections.abc import Sequence
from typing import Any

from torchvision import tv_tensors

from .base import ImageDataset, OnError
from .errors import DataError
from .imageio import read_image
from .palettes import distinct_colours
from .paths import first_folder, list_images
from .transforms import Sample, TransformSpec


class ImageFolder(ImageDataset):
    """root/split/class/**/picture; the target has `label` int.

    Args:
        root, split, transforms, seed, on_error: as ImageDataset. split='' means that the class folders lie in root.
        classes: names in label order, a selection if fewer than the folders. By default the sorted folders of
            root/train (of the split itself where there is no train), so that a validation split without some class
            does not shift the labels.
        exif: rotate by EXIF orientation.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        classes: Sequence[str] | None = None,
        exif: bool = True,
    ) -> None:
        super().__init__(root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._folder = first_folder(self.root, [split], 'split')
        self._exif = exif
        here = _folders(self._folder)
        problems: list[tuple[str, str]] = []
        if classes is None:
            train = self.root / 'train'
            names = _folders(train) if split and train.is_dir() else here
            for name in sorted(set(here) - set(names)):
                near = difflib.get_close_matches(name, names, n=1)
                hint = f' (nearest: {near[0]!r})' if near else ''
                problems.append((str(self._folder / name), f'is not a class of {train}{hint}'))
        else:
            names = [str(name) for name in classes]
            for name in sorted(set(names) - set(here)):
                near = difflib.get_close_matches(name, here, n=1)
                hint = f' (nearest: {near[0]!r})' if near else ''
                problems.append((str(self._folder / name), f'named in classes, but there is no such folder{hint}'))
        if not names:
            raise DataError(f'ImageFolder: {self._folder} holds no class folders (root/split/class/picture)')
        self._files: list[tuple[str, int]] = []
        for label, name in enumerate(names):
            files = list_images(self._folder / name)
            if not files and name in here:
                problems.append((str(self._folder / name), 'class folder without an image'))
            self._files += [(f'{name}/{file}', label) for file in files]
        self.metainfo = {'classes': tuple(names), 'palette': distinct_colours(len(names))}
        self._start(len(self._files), problems)

    def file(self, record: int) -> Any:
        return self._folder / self._files[record][0]

    def read(self, record: int) -> Sample:
        image = read_image(self.file(record), exif=self._exif)
        return {'image': tv_tensors.Image(image), 'label': self._files[record][1]}


def _folders(folder: Any) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))
