"""Builds the demo datasets on disk: deterministic, atomic, safe when several processes build at once.

A dataset is written into a temporary folder beside its place and renamed when complete, so a folder with the final name
is always whole. If another process was faster, its folder (the same bytes) is used and ours is removed.
"""

import difflib
import json
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from ..paths import data_home
from ..progress import track
from .scenes import Scene, draw_scene
from .sources import SPLITS, MissingExtra, digits, photograph, split

VERSION = 1  # of the data: raise it when any written byte changes
_SCENES = {'train': 3000, 'val': 200}
_SIZE = 96
_TILE, _TILES = 128, 28  # side, and most tiles of one photograph
_VAL_CROP = 96
_VAL_CROPS = 32
_FLAT = 3.0  # texture below this teaches a restorer nothing
_DIGIT_COLOURS = [
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
]


def is_demo(root: str) -> bool:
    """Whether `root` names a demo dataset ('demo:...') rather than a folder."""
    return str(root).startswith('demo:')


def resolve(root: str) -> pathlib.Path:
    """Folder of a demo dataset, built first if it is not there.

    Args:
        root: 'demo:classification', 'demo:detection', 'demo:segmentation' or 'demo:restoration'. The scenes come in
            96x96; another side is named with an at sign: 'demo:detection@128' (64 to 512).

    Returns:
        The folder under $DENSEZOO_DATA (default ~/.cache/densezoo). Detection and segmentation share one folder.

    Raises:
        ValueError: unknown name or size.
        MissingExtra: scikit-image, scikit-learn or pycocotools is not installed.
    """
    match = re.fullmatch(r'demo:([^@]*)(?:@(\d+))?', str(root))
    if match is None or match[1] not in NAMES:
        near = difflib.get_close_matches(str(root).removeprefix('demo:'), NAMES, n=1, cutoff=0.4)
        hint = f'; did you mean demo:{near[0]}?' if near else ''
        raise ValueError(
            f'unknown demo dataset {root=}: must be one of {", ".join("demo:" + name for name in NAMES)}{hint}'
        )
    build = _BUILDERS[match[1]]
    folder = build.__name__.removeprefix('_')
    size = _SIZE
    if match[2] is not None:
        size = int(match[2])
        if build is not _scenes or not 64 <= size <= 512:
            raise ValueError(f'{root=}: a size is for demo:detection and demo:segmentation and must be 64..512')
        folder += '' if size == _SIZE else f'-{size}'
    place = data_home() / f'demo-v{VERSION}' / folder
    if not place.is_dir():
        start = time.monotonic()
        print(f'building {root} in {place} (once, some seconds) ...', file=sys.stderr, flush=True)
        _atomically(place, lambda target: build(target, size))
        print(f'built {root} in {time.monotonic() - start:.1f} s', file=sys.stderr, flush=True)
    return place


def _atomically(place: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
    """Run `build` on a temporary folder and rename it to `place`; whoever renames first wins."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f'.{place.name}-', dir=place.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- the four datasets


def _classification(folder: pathlib.Path, size: int) -> None:
    """{train,val}/{label}/{scan}.png, grey 32x32: the scan upsampled four times (bicubic), white ink on black."""
    scans = digits()
    _save_json(folder / 'split.json', {'digits': split()['digits']})
    for part in SPLITS:
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
        indices = split()['digits'][part]
        for index in track(indices, f'demo:classification {part}'):
            ink = Image.fromarray(scans.ink[index]).resize((32, 32), Image.Resampling.BICUBIC)
            pixels = np.rint(np.asarray(ink).clip(0, 1) * 255).astype(np.uint8)
            _save_png(folder / part / str(scans.labels[index]) / f'{index:04d}.png', pixels)


def _scenes(folder: pathlib.Path, size: int) -> None:
    """images/, masks/ and annotations/ of the digit scenes; split.json and classes.json beside them."""
    try:
        import pycocotools.mask
    except ImportError as error:
        raise MissingExtra(f'the demo data needs pycocotools: pip install densezoo[demo] ({error})') from None
    _save_json(folder / 'split.json', split())
    _save_json(
        folder / 'classes.json',
        {'classes': ['background', *map(str, range(10))], 'palette': [(0, 0, 0), *_DIGIT_COLOURS]},
    )
    (folder / 'annotations').mkdir()
    for number, part in enumerate(SPLITS):
        for kind in ('images', 'masks'):
            (folder / kind / part).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        scenes = _drawn(number, part, size)
        for index, scene in enumerate(track(scenes, f'demo:detection {part}', _SCENES[part])):
            file = f'{index:05d}.png'
            labels = np.zeros((size, size), dtype=np.uint8)
            images.append(
                {'id': index + 1, 'file_name': file, 'height': size, 'width': size, 'photograph': scene.photograph}
            )
            for digit in scene.digits:
                labels[digit.mask] = digit.label + 1
                run_lengths = pycocotools.mask.encode(np.asfortranarray(digit.mask, dtype=np.uint8))
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': index + 1,
                        'category_id': digit.label + 1,
                        'bbox': list(digit.box),
                        'area': int(digit.mask.sum()),
                        'iscrowd': 0,
                        'segmentation': {'size': [size, size], 'counts': run_lengths['counts'].decode()},
                        'digit': digit.scan,
                    }
                )
            _save_png(folder / 'images' / part / file, scene.image)
            _save_png(folder / 'masks' / part / file, labels)
        _save_json(
            folder / 'annotations' / f'instances_{part}.json',
            {
                'info': {'description': 'densezoo demo: scanned digits on photographs', 'version': str(VERSION)},
                'licenses': [],
                'images': images,
                'annotations': annotations,
                'categories': [{'id': label + 1, 'name': str(label), 'supercategory': 'digit'} for label in range(10)],
            },
        )


def _restoration(folder: pathlib.Path, size: int) -> None:
    """{train,val}/{photograph}[-{percent}]_{top}_{left}.png: for train overlapping 128x128 tiles, flat ones left out;
    for val the 96x96 crops with the most texture."""
    _save_json(folder / 'split.json', {'photographs': split()['photographs']})
    chosen = {part: list(crops(part)) for part in SPLITS}
    for part, cut in chosen.items():
        (folder / part).mkdir()
        for name, top, left, pixels in track(cut, f'demo:restoration {part}'):
            _save_png(folder / part / f'{name}_{top:04d}_{left:04d}.png', pixels)


def crops(part: str) -> Iterator[tuple[str, int, int, np.ndarray]]:
    """(name, top, left, uint8 RGB pixels) of the restoration crops of one split; the name is the photograph's and, for
    reduced copies, the percentage. Training sees each photograph at two sizes, for finer texture."""
    chosen: list[tuple[float, str, int, int, np.ndarray]] = []
    side, step = (_TILE, _TILE * 3 // 4) if part == 'train' else (_VAL_CROP, _VAL_CROP)
    for name in split()['photographs'][part]:
        whole = photograph(name)
        scale = min(1.0, 768 / max(whole.shape))
        cells = []
        for percent in [round(100 * scale), round(60 * scale)] if part == 'train' else [100]:
            picture = _reduced(whole, percent)
            for top in range(0, picture.shape[0] - side + 1, step):
                for left in range(0, picture.shape[1] - side + 1, step):
                    pixels = picture[top : top + side, left : left + side]
                    label = name if percent == 100 else f'{name}-{percent}'
                    cells.append((texture(pixels), label, top, left, pixels))
        if part == 'train':  # no photograph outweighs the others
            cells = _most_textured([cell for cell in cells if cell[0] > _FLAT], _TILES)
        chosen += cells
    if part == 'val':
        chosen = _most_textured(chosen, _VAL_CROPS)
    return (cell[1:] for cell in sorted(chosen, key=lambda cell: cell[1:4]))


def _most_textured(cells: list, count: int) -> list:
    return sorted(cells, key=lambda cell: (-cell[0], *cell[1:4]))[:count]


def texture(pixels: np.ndarray) -> float:
    """Median of the luminance's standard deviation (0..255) in 8x8 blocks: high where texture covers the crop."""
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    grey = pixels[:height, :width].astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    blocks = grey.reshape(height // 8, 8, width // 8, 8)
    return float(np.median(blocks.std(axis=(1, 3))))


_BUILDERS = {
    'classification': _classification,
    'detection': _scenes,
    'segmentation': _scenes,
    'restoration': _restoration,
}
NAMES = tuple(_BUILDERS)


def _drawn(number: int, part: str, size: int) -> Iterator[Scene]:
    return (draw_scene(seed=(VERSION, number, index), part=part, size=size) for index in range(_SCENES[part]))


def _reduced(picture: np.ndarray, percent: int) -> np.ndarray:
    """The photograph at `percent` of its size."""
    if percent == 100:
        return picture
    height, width = (round(side * percent / 100) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def _save_png(path: pathlib.Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, compress_level=4)


def _save_json(path: pathlib.Path, content: object) -> None:
    path.write_text(json.dumps(content, separators=(',', ':')) + '\n')
