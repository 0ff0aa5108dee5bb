"""Restoration: pairs of degraded and clean pictures, or clean ones that are degraded on the fly."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torchvision import tv_tensors

from .base import ImageDataset, OnError
from .errors import DataError
from .imageio import read_image
from .pairs import PairedImages, match
from .paths import first_folder, list_images
from .transforms import Sample, TransformSpec, build


class _Restoration(ImageDataset):
    """Image and `clean` as float32 in 0..1; transforms see uint8 where the files have 8 bits."""

    _exif = True

    def finish(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        return _unit(sample['image']), {'clean': _unit(sample['clean'])}


class PairedFolder(_Restoration, PairedImages):
    """Pairs of equal names and sizes: image (3, H, W) float32 0..1 degraded, target `clean` likewise.

    Looks for <split>/input with <split>/target and for input/<split> with target/<split>.

    Args:
        root, split, transforms, seed, on_error: as ImageDataset. Transforms change both pictures alike.
        inputs, targets: the two folders relative to root, where the layout is another.
        exif: rotate by EXIF orientation.
    """

    partner = 'target'

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str = 'train',
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
        inputs: str | None = None,
        targets: str | None = None,
        exif: bool = True,
    ) -> None:
        super().__init__(root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._exif = exif
        self._pictures = first_folder(self.root, _places('input', split, inputs), 'inputs')
        self._partners = first_folder(self.root, _places('target', split, targets), 'targets')
        names = list_images(self._partners)
        self._pairs, problems = match(self._pictures, self._partners, names, partner=self.partner)
        matched = {name for _, name in self._pairs}
        lonely = f'has no input of this name in {self._pictures}'
        problems += [(str(self._partners / name), lonely) for name in names if name not in matched]
        self._start(len(self._pairs), problems)

    def read(self, record: int) -> Sample:
        image = _read(self.file(record), self._exif)
        clean = _read(self.partner_file(record), self._exif)
        self._same_size(record, image.shape, clean.shape)
        return {'image': tv_tensors.Image(image), 'clean': tv_tensors.Image(clean)}


class CleanFolder(_Restoration):
    """Clean pictures below root/split, degraded on the fly: image (3, H, W) float32 degraded, target `clean` 0..1.

    The degradation comes after the transforms and draws from the generator that the dataset seeds: anew for each draw
    in training, always the same for an index in evaluation.

    Args:
        root, split, transforms, seed, on_error: as ImageDataset.
        degrade: callable float (3, H, W) in 0..1 -> the same shape, or dict(type=GaussianNoise, sigma=25). One with
            a `scale` (Downscale) makes the image so much smaller than `clean`; Holes gives it a fourth channel.
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
        degrade: Callable[[Tensor], Tensor] | Mapping[str, Any],
        exif: bool = True,
    ) -> None:
        super().__init__(root=root, split=split, transforms=transforms, seed=seed, on_error=on_error)
        self._exif = exif
        self.degrade = build(degrade, 'degrade')
        if not callable(self.degrade):
            raise TypeError(f'degrade must be a callable or dict(type=..., ...), got {degrade!r}')
        self._folder = first_folder(self.root, [split], 'split')
        self._files = list_images(self._folder)
        self._start(len(self._files))

    def file(self, record: int) -> pathlib.Path:
        return self._folder / self._files[record]

    def read(self, record: int) -> Sample:
        return {'image': tv_tensors.Image(_read(self.file(record), self._exif))}

    def finish(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        clean = _unit(sample['image'])
        degraded = self.degrade(clean)
        scale = int(getattr(self.degrade, 'scale', 1))
        height, width = (side // scale for side in clean.shape[-2:])
        if degraded.shape[-2:] != (height, width) or degraded.shape[0] - clean.shape[0] not in (0, 1):
            raise DataError(f'degrade must keep the shape, got {tuple(degraded.shape)} from {tuple(clean.shape)}')
        return degraded, {'clean': clean[:, : height * scale, : width * scale].contiguous()}


def _read(path: pathlib.Path, exif: bool) -> Tensor:
    """uint8 for files of 8 bits, float32 0..1 for deeper ones."""
    return read_image(path, exif=exif, deep_as_float=True)


def _unit(image: Tensor) -> Tensor:
    plain = image.as_subclass(Tensor)
    return plain.contiguous() if plain.is_floating_point() else plain.contiguous().float().div_(255.0)


def _places(kind: str, split: str, given: str | None) -> list[str]:
    if given is not None:
        return [given]
    return [f'{split}/{kind}', f'{kind}/{split}'] if split else [kind]
