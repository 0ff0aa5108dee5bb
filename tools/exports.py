"""The export matrix: every model x {ONNX, fp16, int8, engine, dynamic batch, dynamic size}: yes, or the reason.

python tools/exports.py docs/exports.md                      # the smallest model of each family
python tools/exports.py docs/exports.md --reduced            # narrow, shallow copies: an hour
python tools/exports.py docs/exports.md --models 'swin*' --results runs/exports.json     # goes on where it stopped

Each cell is what happened when it was run: pyramids go from PyTorch to ONNX with a dynamic batch, are compared in
onnxruntime at another batch, and become TensorRT engines for batches 1 to 8 by NVIDIA's own compiler.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densezoo.backbones import create_model, list_models
from densezoo.backbones.registry import model_class
from densezoo.deploy import Half, build_engine, check_onnx, export_onnx, fuse_for_deploy, quantize
from densezoo.deploy.onnx import replacing
from densezoo.tools.common import report_errors

COLUMNS = ('onnx', 'fp16', 'int8', 'engine', 'engine fp16', 'engine int8', 'dynamic size', 'engine of any size')
FP32_TOLERANCE, FP16_COSINE, INT8_COSINE = 1e-4, 0.999, 0.95
BATCH = (1, 4, 8)
SIZES = (256, 512, 1024)
# what in a name tells the sizes of one family apart
_SIZE = re.compile(
    r'_(nano|tiny|small|medium|base|x?large|huge|ti|[stmbl]|[smb]\d+|[vl]?\d+m?|img\d+|patch\d+|window\d+|7x7)(?=_|$)'
)


def families() -> dict[str, list[str]]:
    """The smallest model of each family -> all names of the family, itself included, by registry order."""
    groups: dict[Any, list[str]] = {}
    for name in list_models():
        groups.setdefault((model_class(name), _SIZE.sub('', name)), []).append(name)
    return {min(names, key=_published_size): names for names in groups.values()}


def _published_size(name: str) -> float:
    with torch.device('meta'):
        return sum(p.numel() for p in create_model(name).parameters())


def build(name: str, *, reduced: bool) -> nn.Module:
    """A model in dense form, fused, with seeded weights whose scales hide no branch."""
    torch.manual_seed(0)
    options = model_class(name).reduced if reduced else {}
    model: Any = create_model(name, features_only=True, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if not key.endswith('bias') else -0.5))
    return fuse_for_deploy(model)


class Trial:
    """One model on its way: each method does one cell of the matrix, and raises if it does not hold.

    Args:
        model: takes images (B, 3, H, W).
        images: (2, 3, H, W), of the exported size.
        folder: for files.
        outputs: names of them.
    """

    def __init__(self, model: nn.Module, images: Tensor, folder: Path, outputs: Sequence[str] | None = None):
        self.model, self.images, self.folder, self.outputs = model, images, folder, outputs
        self.other = torch.cat([images, images[:1].flip(-1)])  # another batch than the exported one

    def onnx(self) -> str:
        path = export_onnx(self.model, self.images, self.folder / 'fp32.onnx', outputs=self.outputs)
        return self._within(path, self.other)

    def fp16(self) -> str:
        path = export_onnx(
            Half(self.model, 'fp16'),
            self.images,
            self.folder / 'fp16.onnx',
            outputs=self.outputs,
            metadata={'precision': 'fp16'},
        )
        return _alike(min(row.cosine for row in check_onnx(self.model, path, self.other)), FP16_COSINE)

    def int8(self) -> str:
        path = quantize(self._file('fp32'), self.folder / 'int8.onnx', [self.images])
        return _alike(min(row.cosine for row in check_onnx(self.model, path, self.other)), INT8_COSINE)

    def engine(self, precision: str = 'fp32') -> str:
        path = self.folder / 'model.engine'
        report = build_engine(self._file(precision), path, batch=BATCH)
        return f'yes, {report["bytes"] / 2**20:.1f} MiB'

    def dynamic_size(self, sizes: Sequence[tuple[int, int]] = ((197, 133), (64, 96))) -> str:
        smallest = int(getattr(self.model, 'min_dynamic_size', 33))
        # of more than 64 pixels, maps of the last stage have more than one row
        copies = -(-max(65, smallest) // min(self.images.shape[-2:]))
        example = self.images.repeat(1, 1, copies, copies)
        path = export_onnx(self.model, example, self.folder / 'any.onnx', outputs=self.outputs, dynamic_size=True)
        generator = torch.Generator().manual_seed(3)
        worst = [
            self._within(path, torch.randn(3, 3, *(max(side, smallest) for side in size), generator=generator))
            for size in sizes
        ]
        return max(worst)

    def engine_of_any_size(self) -> str:
        report = build_engine(self._file('any'), self.folder / 'any.engine', batch=BATCH, size=SIZES)
        return f'yes, {report["bytes"] / 2**20:.1f} MiB'

    def _within(self, path: Path, images: Tensor) -> str:
        worst = max(row.max_rel for row in check_onnx(self.model, path, images))
        if worst > FP32_TOLERANCE:
            raise ValueError(f'differs by {worst:.1e} of the range')
        return f'yes, {worst:.0e}'

    def _file(self, kind: str) -> Path:
        path = self.folder / f'{kind}.onnx'
        if not path.is_file():
            raise ValueError(f'no {"ONNX file of dynamic size" if kind == "any" else kind + " ONNX file"}')
        return path


def _alike(cosine: float, wanted: float) -> str:
    if cosine < wanted:
        raise ValueError(f'cosine {cosine:.4f}')
    return f'yes, {cosine:.4f}'


def row(name: str, *, reduced: bool, columns: Sequence[str] = COLUMNS) -> dict[str, str]:
    """One model's line of the matrix: 'yes, ...' or the reason, by column."""
    model: Any = build(name, reduced=reduced)
    side = max(model.default_cfg['input_size'][-1], model.sizes.minimum)
    size = (64, 96) if reduced and model.sizes.dynamic else (side, side)
    if not model.sizes.dynamic:
        size = model.sizes.height_width
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(model, images, Path(scratch))
        steps: dict[str, Callable[[], str]] = {
            'onnx': trial.onnx,
            'fp16': trial.fp16,
            'int8': trial.int8,
            'engine': trial.engine,
            'engine fp16': lambda: trial.engine('fp16'),
            'engine int8': lambda: trial.engine('int8'),
            'dynamic size': trial.dynamic_size,
            'engine of any size': trial.engine_of_any_size,
        }
        found = {}
        for column in columns:
            if 'size' in column and not model.sizes.dynamic:
                found[column] = f'no: {model.sizes.why.split(";")[0]}'
                continue
            try:
                found[column] = steps[column]()
            except Exception as error:  # whatever it is, it is the cell's content
                found[column] = 'no: ' + ' '.join(str(error).split())[:160]
    return found


def page(rows: Sequence[dict[str, Any]], *, reduced: bool) -> str:
    """docs/exports.md."""
    copies = 'a narrow, shallow copy of the smallest model' if reduced else 'the smallest model'
    lines = [
        '# What exports',
        '',
        f'Written by `python tools/exports.py docs/exports.md{" --reduced" if reduced else ""}`, which ran every cell '
        f'on {copies} of each family (a larger one is the same code), as a pyramid with random weights.',
        '',
        f'- onnx: dynamic batch, compared with PyTorch in onnxruntime at another batch: largest difference in units of '
        f"the output's range, at most {FP32_TOLERANCE:.0e}",
        f'- fp16, int8: smallest cosine of an output with that of PyTorch in float32, at least {FP16_COSINE} and '
        f'{INT8_COSINE} (int8 of random weights on two random images; trained models: deploy.md)',
        f"- engine: built by NVIDIA's compiler for batches {', '.join(map(str, BATCH))} without a plugin; its size",
        f'- dynamic size: ONNX of any height and width, compared at two of them; as an engine for {SIZES[0]} to '
        f'{SIZES[2]} pixels and batches {BATCH[0]} to {BATCH[2]} in one profile',
        '',
        '| model | ' + ' | '.join(COLUMNS) + ' |',
        '|---|' + '---|' * len(COLUMNS),
    ]
    lines += [f'| {r["model"]} | ' + ' | '.join(r['cells'].get(c, '') for c in COLUMNS) + ' |' for r in rows]
    missing = [name for name in families() if name not in {r['model'] for r in rows}]
    if missing:
        lines += ['', f'Not run yet: {", ".join(missing)}.']
    lines += ['', 'The same code as the model in front:', '']
    lines += [f'- {r["model"]}: {", ".join(r["same"])}' for r in rows if r['same']]
    return '\n'.join(lines) + '\n'


def measured(
    names: dict[str, list[str]], *, reduced: bool, results: Path | None, minutes: float
) -> Iterator[dict[str, Any]]:
    """Rows, those of an earlier call first read from `results`, new ones added to it while there is time."""
    done = json.loads(results.read_text()) if results is not None and results.is_file() else {}
    begin = time.perf_counter()
    for name, same in names.items():
        if name not in done:
            if time.perf_counter() - begin > 60 * minutes:
                continue
            start = time.perf_counter()
            cells = row(name, reduced=reduced)
            done[name] = {'model': name, 'cells': cells, 'same': [other for other in same if other != name]}
            good = sum(cell.startswith('yes') for cell in cells.values())
            print(f'{name}: {good} of {len(cells)}, {time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
            if results is not None:
                with replacing(results) as unfinished:
                    unfinished.write_text(json.dumps(done, indent=1))
        yield done[name]


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description='Write the export matrix.')
    arguments.add_argument('page', type=Path, help='the Markdown file to write')
    arguments.add_argument('--models', default='*', help='shell pattern of names')
    arguments.add_argument('--reduced', action='store_true', help='narrow, shallow copies of the models')
    arguments.add_argument('--minutes', type=float, default=float('inf'), help='begin no further model after so many')
    arguments.add_argument('--results', type=Path, help='JSON of the cells, read and extended')
    options = arguments.parse_args(argv)
    names = {name: same for name, same in families().items() if fnmatch(name, options.models)}
    if not names:
        raise ValueError(f'no family matches {options.models!r}; the smallest models are {", ".join(families())}')
    rows = list(measured(names, reduced=options.reduced, results=options.results, minutes=options.minutes))
    with replacing(options.page) as unfinished:
        unfinished.write_text(page(rows, reduced=options.reduced))
    return 0


if __name__ == '__main__':
    sys.exit(main())
