"""Run a checkpoint on images: `python tools/predict.py CONFIG CHECKPOINT IMAGES...`, or `densezoo predict ...`.

IMAGES are files, folders or patterns ('photos/*.jpg'). Into --out go an overlay `<name>.png` for each image, the masks
or restored images where the task makes such, and `predictions.json`: a list with one entry per image,

    {'file', 'size': [H, W], ...} with   'label', 'name', 'score', 'scores'                     classification
                                         'boxes' (xyxy pixels), 'labels', 'names', 'scores'     detection
                                         'masks' (COCO RLE)                                     ... of instances
                                         'mask' (a PNG of class ids), 'classes' {name: share}   segmentation
                                         'restored' (a PNG)                                     restoration

With --show-tokens a sheet `<name>_tokens.png` shows what each block of a model with `reduction` makes of the patches.

FILE.onnx and FILE.engine, which `densezoo export` writes, take the place of the checkpoint. An image that cannot be
read is named and left out, and the exit status is 1.
"""

import argparse
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from densezoo.tools.common import add_config, open_deployed, report_errors

ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif', '.ppm', '.pgm')


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog='densezoo predict', description='Run a checkpoint on images.')
    add_config(arguments)
    arguments.add_argument('checkpoint', help='best.pth or last.pth of a run, FILE.onnx or FILE.engine')
    arguments.add_argument('images', nargs='+', help="files, folders, or patterns such as 'photos/*.jpg'")
    arguments.add_argument('--out', default='predictions', help='folder of the results (default: predictions)')
    arguments.add_argument('--batch-size', type=int, default=1, help='images at once (default: 1)')
    arguments.add_argument('--device', help="'cpu', 'cuda', ... (default: a GPU where there is one)")
    arguments.add_argument(
        '--score-threshold', type=float, default=0.3, help='detections below it are left out (default: 0.3)'
    )
    arguments.add_argument(
        '--show-tokens',
        action='store_true',
        help='also <name>_tokens.png: which patches were fused or dropped in each block, of a model with a reduction',
    )
    return arguments


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Files, folders (all pictures below them) and patterns -> files, each once, in order."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob('*') if p.suffix.lower() in ENDINGS)
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not files:
            raise FileNotFoundError(f'no image {pattern!r}: neither a file, nor a folder or pattern with images')
        found.update(dict.fromkeys(files))
    return list(found)


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f'--batch-size must be at least 1, got {options.batch_size}')
    from densezoo.data import DataError
    from densezoo.train import load_config
    from densezoo.train.inference import Predictor
    from densezoo.train.visualize import draw, save

    files = find_images(options.images)
    config = load_config(options.config, options.cfg_options)
    deployed = open_deployed(options.checkpoint)
    predictor = Predictor(config, options.checkpoint if deployed is None else deployed, device=options.device)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    names = unique_names(files)
    entries: list[dict[str, Any]] = []
    unreadable = 0
    for group in batches(files, options.batch_size):
        samples = []
        for file in group:
            try:
                samples.append(predictor.read(file))
            except DataError as error:
                unreadable += 1
                print(f'left out: {error}', file=sys.stderr)
        tokens = predictor.draw_tokens(samples) if samples and options.show_tokens else [None] * len(samples)
        results = predictor(samples) if samples else []
        for sample, result, picture in zip(samples, results, tokens, strict=True):
            name = names[Path(sample['target']['file'])]
            if 'scores' in result and 'boxes' in result:
                keep = result['scores'] >= options.score_threshold
                result = {key: value[keep] for key, value in result.items()}
            if picture is not None:
                save(out / f'{name}_tokens.png', picture)
            entries.append(predictor.describe(result, sample['target'], out, name))
            save(
                out / f'{name}.png',
                draw(
                    sample['image'],
                    result,
                    {'size': sample['target']['size'], 'original_size': sample['target']['original_size']},
                    predictor.metainfo,
                    score_threshold=options.score_threshold,
                ),
            )
    (out / 'predictions.json').write_text(json.dumps(entries, indent=1) + '\n')
    left_out = f', {unreadable} could not be read' if unreadable else ''
    print(f'{len(entries)} images predicted{left_out}: {out}')
    return 1 if unreadable else 0


def batches(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


def unique_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file's results: its stem, numbered where several files share it."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 1
        while name in taken:
            number += 1
            name = f'{file.stem}_{number}'
        taken.add(name)
        names[file] = name
    return names


if __name__ == '__main__':
    sys.exit(main())
