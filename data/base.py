"""What all datasets share: how a sample is seeded, what happens to bad files, and what the rest of densezoo may ask."""

import contextlib
import itertools
import os
import pathlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from . import demo
from .errors import DataError, problem_list
from .imageio import probe
from .paths import expand_root
from .progress import track
from .transforms import Sample, TransformSpec, build_transforms

OnError = Literal['raise', 'skip']
_COUNTERS = 64  # one slot per worker, so that no two processes write the same one


class ImageDataset(Dataset):
    """Base of the readers; `dataset[index]` or `dataset[(index, draw)]` is {'image': Tensor, 'target': dict}.

    The augmentation of a sample is seeded from (seed, draw), with a plain index from (seed, index), and torch, numpy
    and random get their states back afterwards: a sample does not depend on the worker that makes it.
    The target always holds `file`, `image_id`, `index`, `draw`, `size` (height, width of the returned image) and
    `original_size` (of the picture on disk after EXIF rotation).

    A reader calls this constructor, sets `metainfo`, calls `_start(n)` with the number of its records, and defines
    `file(record)`, `read(record)` and, if need be, `finish(sample)`, `inspect(record)` and `_ratio(record)`.

    Args:
        root: a folder (`~` and $VARIABLES are expanded) or 'demo:...', the built-in data.
        split: usually 'train' or 'val'; each reader says where it looks.
        transforms: list of callables or dict(type=..., ...); see densezoo.data.transforms.
        seed: of the augmentation.
        on_error: 'raise' a DataError that names what is wrong; or 'skip': what is found while indexing or by `check` is
            dropped with one counted warning, and a file that fails later is replaced by the next good one, counted in
            `skipped`.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str,
        transforms: Sequence[TransformSpec] | None = None,
        seed: int = 0,
        on_error: OnError = 'raise',
    ) -> None:
        if on_error not in ('raise', 'skip'):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error=}")
        self.root = demo.resolve(str(root)) if demo.is_demo(str(root)) else expand_root(root)
        self.split = split
        self.seed = int(seed)
        self.on_error = on_error
        self.transforms = build_transforms(transforms)
        self.metainfo: dict[str, Any] = {}
        self._records = np.zeros(0, dtype=np.int64)
        self._bad: set[int] = set()
        self._skips = torch.zeros(_COUNTERS, dtype=torch.int64).share_memory_()

    # ---------------------------------------------------------------- what a reader defines

    def file(self, record: int) -> pathlib.Path:
        """Path of the picture of a record."""
        raise NotImplementedError

    def read(self, record: int) -> Sample:
        """The sample of a record as stored, for the transforms: 'image' and the annotations. Raises DataError."""
        raise NotImplementedError

    def finish(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        """Image and target from a transformed sample, as plain tensors."""
        image = sample.pop('image').as_subclass(Tensor)
        return image, sample

    def image_id(self, record: int) -> int:
        """Number of a picture in its annotation file; the record where there is none."""
        return record

    def inspect(self, record: int) -> None:
        """Raises DataError if the files of a record are missing, cut off or do not fit each other."""
        probe(self.file(record))

    def _ratio(self, record: int) -> float:
        height, width = probe(self.file(record))
        return height / width

    # ---------------------------------------------------------------- indexing

    def _start(self, count: int, problems: Sequence[tuple[str, str]] = (), keep: Sequence[int] | None = None) -> None:
        """Records 0..count-1 are served (or `keep` of them); what indexing found is raised or warned about."""
        self._records = np.arange(count) if keep is None else np.asarray(keep, dtype=np.int64)
        self._report(list(problems))
        if len(self._records) == 0:
            raise DataError(
                f'{type(self).__name__}: no usable image for split={self.split!r} in root={str(self.root)!r}'
            )

    def _report(self, problems: list[tuple[str, str]]) -> None:
        if not problems:
            return
        name = f'{type(self).__name__}(split={self.split!r})'
        if self.on_error == 'raise':
            raise DataError(problem_list(problems, name, "Repair them or pass on_error='skip'"))
        warnings.warn(problem_list(problems, name, 'They are left out'), stacklevel=4)

    def __len__(self) -> int:
        return len(self._records)

    def check(self, *, decode: bool = False) -> list[tuple[str, str]]:
        """Looks at every file before training: present, not cut off, sizes as annotated; `decode` reads them fully.

        Returns: problems as (file, reason). With on_error='raise' they are a DataError instead that lists the first
        and the count; with 'skip' their records are dropped with one warning. Call it before a sampler is made.
        """
        problems, good = [], []
        for record in track(self._records.tolist(), f'checking {self.split}'):
            try:
                if decode:
                    self.read(record)
                else:
                    self.inspect(record)
                good.append(record)
            except DataError as error:
                file = str(self.file(record))
                problems.append((file, str(error).removeprefix(f'{file}: ')))
        self._report(problems)
        self._start(0, keep=good)
        return problems

    def aspect_ratios(self) -> list[float]:
        """Height / width of each picture, for batches of like shapes."""
        return [self._ratio(record) for record in track(self._records.tolist(), f'reading sizes of {self.split}')]

    @property
    def skipped(self) -> int:
        """How many times a file that failed was replaced by another, over all workers."""
        return int(self._skips.sum())

    # ---------------------------------------------------------------- samples

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is outside a dataset of {len(self)}')
        _quiet_worker()
        with seeded(self.seed, draw):
            sample, facts = self.load(index % len(self))
            sample = self.augment(sample, facts['file'])
            image, target = self.finish(sample)
        target |= facts
        target['draw'] = int(draw)
        target['size'] = (int(image.shape[-2]), int(image.shape[-1]))
        return {'image': image, 'target': target}

    def load(self, index: int) -> tuple[Sample, dict[str, Any]]:
        """The stored sample at `index` (with 'skip': of the next good one) and its file, image_id, index, size."""
        for step in itertools.count():
            position = (index + step) % len(self)
            record = int(self._records[position])
            if step == len(self):
                raise DataError(f'{type(self).__name__}(split={self.split!r}): not one of {step} files can be used')
            if record in self._bad:
                self._count_skip()
                continue
            try:
                sample = self.read(record)
            except DataError as error:
                if self.on_error == 'raise':
                    raise
                self._bad.add(record)
                self._count_skip()
                warnings.warn(f'{error}; replaced by the next good one ({self.skipped} so far)', stacklevel=2)
                continue
            height, width = sample['image'].shape[-2:]
            facts = {'file': str(self.file(record)), 'image_id': self.image_id(record), 'index': position}
            return sample, facts | {'original_size': (int(height), int(width))}
        raise AssertionError('unreachable')

    def augment(
        self, sample: Sample, file: str, transforms: Sequence[Callable[[Sample], Sample]] | None = None
    ) -> Sample:
        """The sample after the transforms (the dataset's own by default). What one of them raises becomes a DataError
        that names it and the file."""
        for transform in self.transforms if transforms is None else transforms:
            try:
                sample = transform(sample)
            except DataError:
                raise
            except Exception as error:
                name = type(transform).__name__
                text = ' '.join(str(error).split())
                advice = '' if get_worker_info() is None else ' (num_workers=0 shows where)'
                raise DataError(f'{file}: transform {name} failed: {type(error).__name__}: {text}{advice}') from error
        return sample

    def _count_skip(self) -> None:
        worker = get_worker_info()
        self._skips[(worker.id + 1) % _COUNTERS if worker else 0] += 1


@contextlib.contextmanager
def seeded(seed: int, draw: int) -> Iterator[None]:
    """torch (CPU), numpy and random seeded from (seed, draw) inside, and as they were afterwards."""
    number = mixed(seed, draw)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def mixed(*numbers: int) -> int:
    """32 well-mixed bits from integers (splitmix64; torch's CPU generator uses 32 bits of its seed)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + (int(number) & (2**64 - 1))) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 32


def _quiet_worker() -> None:
    """OpenCV, if a transform uses it, must not start threads in each worker."""
    if get_worker_info() is not None and 'cv2' in sys.modules:
        sys.modules['cv2'].setNumThreads(0)
