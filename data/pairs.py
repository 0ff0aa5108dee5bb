"""What readers share whose records are two files of one size: a picture, and its mask or its clean version."""

import os
import pathlib
from collections.abc import Sequence

from .base import ImageDataset
from .errors import DataError
from .imageio import probe
from .paths import list_images

Pairs = list[tuple[str, str]]  # picture and partner, each relative to its folder
Problems = list[tuple[str, str]]  # file and reason


class PairedImages(ImageDataset):
    """Base of such readers: a subclass sets the two folders, the pairs and `_exif` before it calls `_start`."""

    partner = 'partner'  # what the second file is called in messages

    _pictures: pathlib.Path
    _partners: pathlib.Path
    _pairs: Pairs
    _exif: bool

    def file(self, record: int) -> pathlib.Path:
        return self._pictures / self._pairs[record][0]

    def partner_file(self, record: int) -> pathlib.Path:
        """Path of the second file of a record."""
        return self._partners / self._pairs[record][1]

    def inspect(self, record: int) -> None:
        picture, partner = (probe(file, exif=self._exif) for file in (self.file(record), self.partner_file(record)))
        self._same_size(record, picture, partner)

    def _same_size(self, record: int, picture: Sequence[int], partner: Sequence[int]) -> None:
        """Raises DataError unless both (height, width) are equal."""
        if tuple(picture[-2:]) != tuple(partner[-2:]):
            raise DataError(
                f'{self.file(record)}: {self.partner} of another size: the picture is {picture[-1]}x{picture[-2]}, '
                f'{self.partner_file(record)} is {partner[-1]}x{partner[-2]}'
            )


def match(
    pictures: pathlib.Path,
    partners: pathlib.Path,
    names: Sequence[str],
    *,
    partner: str,
    suffixes: tuple[str, str] = ('', ''),
) -> tuple[Pairs, Problems]:
    """Every picture with the partner of its name, and those that have none as problems.

    Args:
        pictures, partners: the folders.
        names: of the possible partners, relative to their folder.
        partner: what they are called in messages.
        suffixes: ends of the names of pictures and partners that are exchanged; '' stands for the file suffix.
    """
    by_stem = {_stem(name, suffixes[1]): name for name in names}
    pairs, problems = [], []
    for name in list_images(pictures, suffixes[0]):
        stem = _stem(name, suffixes[0])
        if stem in by_stem:
            pairs.append((name, by_stem[stem]))
        else:
            problems.append((str(pictures / name), f'has no {partner} {stem}{suffixes[1] or ".*"} in {partners}'))
    return pairs, problems


def _stem(name: str, suffix: str) -> str:
    return name.removesuffix(suffix) if suffix else os.path.splitext(name)[0]
