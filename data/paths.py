"""Where data lies: roots as the user writes them, the cache folder, and listings of images."""

import os
import pathlib

from .errors import DataError

IMAGE_SUFFIXES = frozenset(
    {'.jpg', '.jpeg', '.jfif', '.png', '.bmp', '.webp', '.tif', '.tiff', '.gif', '.ppm', '.pgm', '.avif'}
)


def data_home() -> pathlib.Path:
    """The folder for everything densezoo builds or caches: $DENSEZOO_DATA, by default ~/.cache/densezoo."""
    return pathlib.Path(os.path.expanduser(os.environ.get('DENSEZOO_DATA') or '~/.cache/densezoo'))


def expand_root(root: str | os.PathLike[str]) -> pathlib.Path:
    """An ordinary path with `~` and $VARIABLES expanded; $DENSEZOO_DATA may be used though it is not set."""
    text = os.fspath(root)
    if 'DENSEZOO_DATA' in text:
        text = text.replace('${DENSEZOO_DATA}', str(data_home())).replace('$DENSEZOO_DATA', str(data_home()))
    expanded = os.path.expanduser(os.path.expandvars(text))
    if '$' in expanded:
        raise DataError(f'root={text!r} names an environment variable that is not set')
    return pathlib.Path(expanded)


def list_images(folder: pathlib.Path, suffix: str = '') -> list[str]:
    """Paths of the images below `folder`, relative to it, with forward slashes, sorted; hidden files are left out.

    suffix: only names that end so (`_leftImg8bit.png`); '' takes every known image suffix.
    """
    found: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        inside = os.path.relpath(place, folder).replace(os.sep, '/')
        prefix = '' if inside == '.' else inside + '/'
        for name in names:
            if name.startswith('.'):
                continue
            if name.endswith(suffix) if suffix else os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(prefix + name)
    return sorted(found)


def first_folder(root: pathlib.Path, candidates: list[str], argument: str) -> pathlib.Path:
    """The first of `candidates` that is a folder below `root`; otherwise an error that lists what was looked for."""
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    if not root.is_dir():
        raise DataError(f'root={str(root)!r} is not a folder')
    looked = ', '.join(repr(candidate) for candidate in candidates)
    raise DataError(f'{argument}: no folder {looked} in root={str(root)!r}; pass {argument}= relative to root')
