"""Lists the backbones: parameters, multiply-adds, published accuracy, and on request the measured throughput.

densezoo models                                   all of densezoo's own, as a table
densezoo models 'caformer*' --size 384            a shell pattern; multiply-adds at 384x384
densezoo models 'poolformer_s*' --throughput      images per second here, batch 8
densezoo models 'poolformer_s*' --kernels            which kernels one image takes here (--device cuda: there)
densezoo models --format markdown                 or json
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from densezoo.backbones import AnySize, FixedSize, Resampled, create_model, list_models
from densezoo.backbones.macs import count_macs
from densezoo.kernels import record_choices
from densezoo.tools.common import report_errors

COLUMNS = {
    'name': 'model',
    'size': 'size',
    'params': 'params (M)',
    'macs': 'MACs (G)',
    'top1': 'top-1 (%)',
    'images_per_second': 'images/s',
    'kernels': 'kernels',
    'pyramid': 'pyramid at',
    'export': 'export',
    'licence': 'licence',
    'paper': 'paper',
}


def describe(name: str, *, size: int | None = None, dense: bool = False) -> dict[str, Any]:
    """Figures of one model, computed without its weights on the meta device.

    Args:
        name: of `list_models()`.
        size: height and width; the published input size if None. Models of one size keep theirs.
        dense: figures of the dense form.

    Returns:
        name, size, params (1e6, frozen ones included), macs (1e9, of convolutions and matrix products, at `size`),
        top1 (published, ImageNet-1k), pyramid (the sizes it takes), export (what may vary), licence, paper.
    """
    with torch.device('meta'):
        # the counter's hooks trip over parameters that enter a block as tokens and ask for gradients
        model: Any = create_model(name, features_only=dense).eval().requires_grad_(False)
        side = size if size is not None and model.sizes.dynamic else model.default_cfg['input_size'][-1]
        if model.sizes.dynamic:
            side = max(side, model.sizes.minimum)
    return {
        'name': name,
        'size': side,
        'params': sum(p.numel() for p in model.parameters()) / 1e6,
        'macs': count_macs(model, (side, side), as_it_runs=True) / 1e9,
        'top1': model.metadata.get('top1'),
        'pyramid': _sizes(model.sizes),
        'export': 'batch, size' if model.sizes.dynamic else 'batch',
        'licence': model.metadata.get('licence'),
        'paper': model.metadata.get('paper', '').rpartition('/')[2],
    }


def _sizes(sizes: AnySize | FixedSize) -> str:
    if isinstance(sizes, FixedSize):
        return '{}x{}'.format(*sizes.height_width)
    return 'any size, resampled' if isinstance(sizes, Resampled) else 'any size'


def measure(
    name: str, *, size: int, dense: bool = False, batch: int = 8, repeats: int = 5, device: str = 'cpu'
) -> float:
    """Images per second of the fastest forward pass: float32, evaluation mode, channels_last.

    Args:
        repeats: passes after the one that warms up, fewer where they take more than three seconds together.
    """
    model = create_model(name, features_only=dense).eval().to(device).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    passes: list[float] = []
    with torch.inference_mode():
        while len(passes) < 2 or (len(passes) <= repeats and sum(passes[1:]) < 3):
            start = time.perf_counter()
            model(images)
            if device != 'cpu':
                torch.cuda.synchronize()
            passes.append(time.perf_counter() - start)
    return batch / min(passes)


def kernels_of(name: str, *, size: int, dense: bool = False, device: str = 'cpu') -> str:
    """The path that each operation of densezoo.kernels takes for one image in evaluation mode: 'pool_mixer: torch'."""
    model = create_model(name, features_only=dense).eval().to(device)
    with torch.inference_mode(), record_choices() as choices:
        model(torch.zeros(1, 3, size, size, device=device))
    return ', '.join(dict.fromkeys(f'{choice.operation}: {choice.backend}' for choice in choices)) or 'none'


def as_text(rows: list[dict[str, Any]], markdown: bool = False) -> str:
    """A table with one column per key that any row has a value for."""
    if markdown:
        rows = [{**row, 'paper': f'[{row["paper"]}](https://arxiv.org/abs/{row["paper"]})'} for row in rows]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [[COLUMNS[key] for key in keys]] + [[_cell(row.get(key)) for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    numeric = [all(not isinstance(row.get(key), str) for row in rows) for key in keys]
    lines = [
        [text.rjust(width) if number else text.ljust(width) for text, width, number in zip(line, widths, numeric)]
        for line in cells
    ]
    if not markdown:
        return '\n'.join('  '.join(line).rstrip() for line in lines)
    rule = ['-' * (width - 1) + ':' if number else '-' * width for width, number in zip(widths, numeric)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in [lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.1f}' if isinstance(value, float) else str(value)


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='densezoo models', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('filter', nargs='?', default='*', help='shell pattern of names; with a dot, of name.weights')
    parser.add_argument('--format', choices=('table', 'json', 'markdown'), default='table')
    parser.add_argument('--size', type=int, help='height and width; by default the published one')
    parser.add_argument('--dense', action='store_true', help='the dense form: a pyramid, no classifier')
    parser.add_argument('--throughput', action='store_true', help='measure images per second')
    parser.add_argument('--kernels', action='store_true', help='run one image and show which kernels it takes')
    parser.add_argument('--batch', type=int, default=8, help='images at once for --throughput')
    parser.add_argument('--device', default='cpu', help='device for --throughput and --kernels')
    arguments = parser.parse_args(argv)
    names = list_models(arguments.filter)
    if not names:
        raise ValueError(f'no model matches {arguments.filter!r}; `densezoo models` lists them all')
    rows = []
    for name in names:
        row = describe(name, size=arguments.size, dense=arguments.dense)
        if arguments.throughput:
            row['images_per_second'] = measure(
                name, size=row['size'], dense=arguments.dense, batch=arguments.batch, device=arguments.device
            )
        if arguments.kernels:
            row['kernels'] = kernels_of(name, size=row['size'], dense=arguments.dense, device=arguments.device)
        rows.append(row)
    if arguments.format == 'json':
        print(json.dumps(rows, indent=2))
    else:
        print(as_text(rows, markdown=arguments.format == 'markdown'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
