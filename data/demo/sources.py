"""The real pixels that the demo data is made of, and the one split that all demo datasets share.

Digits: the 1797 scans of scikit-learn's `load_digits` (8x8, ink 0..16; the test part of "Optical Recognition of
Handwritten Digits", E. Alpaydin and C. Kaynak, UCI, CC BY 4.0).
Photographs: those that lie inside the wheels of scikit-image (origins and licences: skimage/data in its documentation)
and scikit-learn (china.jpg, flower.jpg: CC BY 2.0, danielbuechele and vultilion). They are read from the installed
package by path, so that no fetcher can start a download. Pictures with print or writing (page, text) are left out, so
that every digit in a scene is labelled; of the stereo pair only the left view is used.
"""

import functools
import importlib.util
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

# name -> (package, file, split). Photographs of one scene must never stand in both splits.
_PHOTOGRAPHS = {
    'astronaut': ('skimage', 'data/astronaut.png', 'train'),
    'brick': ('skimage', 'data/brick.png', 'train'),
    'camera': ('skimage', 'data/camera.png', 'train'),
    'coffee': ('skimage', 'data/coffee.png', 'train'),
    'coins': ('skimage', 'data/coins.png', 'train'),
    'flower': ('sklearn', 'datasets/images/flower.jpg', 'train'),
    'grass': ('skimage', 'data/grass.png', 'train'),
    'gravel': ('skimage', 'data/gravel.png', 'train'),
    'hubble': ('skimage', 'data/hubble_deep_field.jpg', 'train'),
    'ihc': ('skimage', 'data/ihc.png', 'train'),
    'moon': ('skimage', 'data/moon.png', 'train'),
    'retina': ('skimage', 'data/retina.jpg', 'train'),
    'rocket': ('skimage', 'data/rocket.jpg', 'train'),
    'chelsea': ('skimage', 'data/chelsea.png', 'val'),
    'china': ('sklearn', 'datasets/images/china.jpg', 'val'),
    'motorcycle': ('skimage', 'data/motorcycle_left.png', 'val'),
}
SPLITS = ('train', 'val')
_VAL_DIGITS = 397  # of 1797


class MissingExtra(ImportError):
    """A package of the `demo` extra is not installed; the message is one line with the command that repairs it."""


class Digits(NamedTuple):
    """The scans: `ink` (N, 8, 8) float32 in [0, 1], 1 = full ink; `labels` (N,) int64 in 0..9."""

    ink: np.ndarray
    labels: np.ndarray


@functools.cache
def digits() -> Digits:
    """All 1797 scans in scikit-learn's order; an index into them is a digit's identity in every split file."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing('scikit-learn', error) from None
    scans = load_digits()
    return Digits(scans.images.astype(np.float32) / 16, scans.target.astype(np.int64))


@functools.cache
def photograph(name: str) -> np.ndarray:
    """One photograph as uint8 RGB (H, W, 3); grey ones are repeated over the channels. KeyError for unknown names."""
    package, file, _ = _PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise _missing({'skimage': 'scikit-image', 'sklearn': 'scikit-learn'}.get(package, package))
    path = pathlib.Path(spec.origin).parent / file
    if not path.is_file():
        raise FileNotFoundError(
            f'the photograph {file} is not inside the installed {package} ({path.parent}); reinstall it with '
            'pip install --force-reinstall densezoo[demo]'
        )
    with Image.open(path) as picture:
        return np.asarray(picture.convert('RGB'))


def photograph_names(split: str) -> list[str]:
    """Names of the photographs of one split ('train' or 'val'), sorted."""
    return sorted(name for name, (_, _, its_split) in _PHOTOGRAPHS.items() if its_split == split)


@functools.cache
def split() -> dict[str, dict[str, list]]:
    """The split of every demo dataset: {'photographs': {'train': names, 'val': names}, 'digits': {... scan indices}}.

    Digits are drawn within each class by a fixed seed (1400 train, 397 val), so that both parts hold the classes alike.
    """
    labels = digits().labels
    rng = np.random.default_rng(1797)
    share = np.bincount(labels) * _VAL_DIGITS / len(labels)
    counts = np.floor(share).astype(int)
    counts[np.argsort(counts - share, kind='stable')[: _VAL_DIGITS - counts.sum()]] += 1  # largest remainders
    of_class = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    val = np.concatenate([scans[:count] for scans, count in zip(of_class, counts, strict=True)])
    train = np.setdiff1d(np.arange(len(labels)), val)
    return {
        'photographs': {part: photograph_names(part) for part in SPLITS},
        'digits': {'train': train.tolist(), 'val': np.sort(val).tolist()},
    }


def _missing(package: str, error: Exception | None = None) -> MissingExtra:
    because = f' ({error})' if error is not None else ''
    return MissingExtra(f'the demo data needs {package}: pip install densezoo[demo]{because}')
