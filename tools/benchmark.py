"""Measure ours against a peer, side by side in one run: `python tools/benchmark.py WHAT`, or `densezoo benchmark WHAT`.

python tools/benchmark.py backbones --models poolformer_s12 caformer_s18    # against timm
python tools/benchmark.py backbones --authors HorNet                        # against a checkout of the authors' code
python tools/benchmark.py window                                            # shifted windows against timm's
python tools/benchmark.py kernels --device cuda --dtype float16 --train     # every operation against its peers
python tools/benchmark.py hilo --authors LITv2                             # against attention of the same width
python tools/benchmark.py latency caformer_s18                              # every runtime there is, one table
python tools/benchmark.py reduction --authors ToMe                         # fewer tokens against all of them
python tools/benchmark.py loop                                              # against a bare PyTorch loop
python tools/benchmark.py pipeline --workers 2                              # against torchvision's reference pipeline
python tools/benchmark.py binary                                            # packed layers against float32, one core
python tools/benchmark.py cost deit_tiny_patch16_224 --methods bivit        # operations and energy; `--cost` too
python tools/benchmark.py peers --tasks detection                           # metrics against a torchvision backbone
Ratios above 1 mean that ours is faster. Nothing else should run on the machine.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from densezoo.tools.common import report_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog='densezoo benchmark', description='Measure ours against a peer.')
    arguments.add_argument('--json', action='store_true', help='print JSON instead of a table')
    what = arguments.add_subparsers(dest='what', required=True)
    backbones = what.add_parser('backbones', help="forward passes against timm or the authors' models")
    backbones.add_argument('--models', nargs='+', help='model names (default: one of each family)')
    backbones.add_argument('--authors', metavar='DIR', help="a checkout of an authors' repository, instead of timm")
    backbones.add_argument('--batch', type=int, default=8)
    backbones.add_argument('--size', type=int, default=224)
    backbones.add_argument('--repeats', type=int, default=8)
    backbones.add_argument('--device', default='cpu')
    window = what.add_parser('window', help="shifted-window attention against timm's")
    window.add_argument('--batch', type=int, default=8)
    window.add_argument('--stages', type=int, nargs='+', choices=(1, 2, 3, 4), help='stages of Swin-T (default: all)')
    window.add_argument('--size', type=int, nargs=2, action='append', dest='sizes', metavar=('HEIGHT', 'WIDTH'))
    window.add_argument('--repeats', type=int, default=8)
    window.add_argument('--device', default='cpu')
    kernels = what.add_parser('kernels', help='the operations of densezoo.kernels against their peers')
    kernels.add_argument('--device', default='cpu', help="'cuda' runs the Triton kernels")
    kernels.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32')
    kernels.add_argument('--batch', type=int, default=8)
    kernels.add_argument('--sizes', type=int, nargs='+', metavar='SIDE', help='of images (default: 224 512 1024)')
    kernels.add_argument('--model', choices=('tiny', 'base'), help="whose stages' widths (default: tiny)")
    kernels.add_argument(
        '--operations',
        nargs='+',
        choices=('window', 'hilo', 'sparse', 'blocks', 'neighborhood', 'pool', 'match', 'merge', 'linear'),
    )
    kernels.add_argument('--flash-window', metavar='DIR', help='a checkout of zzd1992/FlashWindowAttention')
    kernels.add_argument('--repeats', type=int, default=10)
    kernels.add_argument('--train', action='store_true', help='time forward and backward too')
    hilo = what.add_parser('hilo', help='HiLo attention against spatial-reduction and window attention, one core')
    hilo.add_argument('--repeats', type=int, default=200)
    hilo.add_argument('--authors', metavar='DIR', help="a checkout of the authors' repository, to compare with too")
    latency = what.add_parser('latency', help='eager, torch.compile, onnxruntime, OpenVINO and TensorRT in one table')
    latency.add_argument('model', help='name of a backbone, or FILE.onnx')
    latency.add_argument('--features', action='store_true', help='the pyramid instead of the classifier')
    latency.add_argument('--batch', type=int, default=1)
    latency.add_argument('--size', type=int, default=224)
    latency.add_argument('--repeats', type=int, default=100)
    latency.add_argument('--device', default='cpu', help="'cpu' or 'cuda'")
    latency.add_argument(
        '--runtimes', nargs='+', help='of eager, compile, onnxruntime, openvino, tensorrt (default: all)'
    )
    reduction = what.add_parser('reduction', help='models with fewer tokens against the same models with all of them')
    reduction.add_argument('--model', help='a plain classifier (default: deit_small_patch16_224)')
    reduction.add_argument('--methods', nargs='+', help="of reduce_tokens (default: those with a paper's setting)")
    reduction.add_argument('--batch', type=int, default=16)
    reduction.add_argument('--size', type=int, default=224)
    reduction.add_argument('--repeats', type=int, default=8)
    reduction.add_argument('--authors', metavar='DIR', help="a checkout of ToMe's repository, to compare with too")
    loop = what.add_parser('loop', help='training iterations against a bare PyTorch loop')
    loop.add_argument('--config', default='quickstart/classification')
    loop.add_argument('--iterations', type=int, default=200)
    pipeline = what.add_parser('pipeline', help="detection data against torchvision's reference pipeline")
    pipeline.add_argument('--root', default='demo:detection', help='a COCO folder')
    pipeline.add_argument('--workers', type=int, default=2)
    pipeline.add_argument('--batches', type=int, default=100)
    pipeline.add_argument('--masks', action='store_true')
    binary = what.add_parser('binary', help="packed binary and shift layers against torch's float32 linear, one core")
    binary.add_argument('--tokens', type=int, nargs='+', help='rows of the input (default: 1 and 196)')
    binary.add_argument('--repeats', type=int, default=50)
    cost = what.add_parser('cost', help='bit operations, shifts, additions, multiplications, energy, bytes moved')
    cost.add_argument('model', help='name of a backbone')
    cost.add_argument('--methods', nargs='+', help='of binarize (default: bivit)')
    cost.add_argument('--batch', type=int, default=1)
    cost.add_argument('--size', type=int, default=224)
    peers = what.add_parser('peers', help="the quickstarts' metrics against a torchvision backbone")
    peers.add_argument('--tasks', nargs='+', help='quickstarts (default: all; each is trained twice)')
    peers.add_argument('--max-iters', type=int, help="iterations of both sides (default: the quickstart's)")
    peers.add_argument('--work-dir', help="where the runs' files go (default: a temporary folder)")
    return arguments


def measure(options: dict[str, Any]) -> list[dict[str, Any]]:
    what = options.pop('what')
    given = {name: value for name, value in options.items() if value is not None}
    if what == 'backbones':
        from densezoo.tools.benchmarks import backbones

        return [comparison.row() for comparison in backbones.run(**given)]
    if what == 'window':
        from densezoo.tools.benchmarks import window

        return [comparison.row() for comparison in window.run(**given)]
    if what == 'kernels':
        from densezoo.tools.benchmarks import kernels

        return [comparison.row() for comparison in kernels.run(**given)]
    if what == 'hilo':
        from densezoo.tools.benchmarks import hilo

        return [comparison.row() for comparison in hilo.run(**given)]
    if what == 'reduction':
        from densezoo.tools.benchmarks import reduction

        return [comparison.row() for comparison in reduction.run(**given)]
    if what == 'latency':
        from densezoo.tools.benchmarks import latency

        return [line.row() for line in latency.run(**given)]
    if what == 'binary':
        from densezoo.tools.benchmarks import binary

        return [line.row() for line in binary.run(**given)]
    if what == 'cost':
        from densezoo.tools.benchmarks import cost

        return [line.row() for line in cost.run(**given)]
    if what == 'pipeline':
        from densezoo.tools.benchmarks import pipeline

        return [comparison.row() for comparison in pipeline.run(**given)]
    with tempfile.TemporaryDirectory() as scratch:
        given.setdefault('work_dir', scratch)
        if what == 'loop':
            from densezoo.tools.benchmarks import loop

            return [comparison.row() for comparison in loop.run(**given)]
        from densezoo.tools.benchmarks import peers

        return peers.run(**given)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; times in milliseconds."""
    if 'unpacking' in rows[0]:
        from densezoo.tools.benchmarks import binary

        return binary.table(rows)
    if 'compute_energy' in rows[0]:
        from densezoo.tools.benchmarks import cost

        return cost.table(rows)
    if 'runtime' in rows[0]:
        lines = ['| runtime | median, ms | p90, ms | p99, ms | images/s |', '|---|---:|---:|---:|---:|']
        for row in rows:
            if row['not_measured']:
                lines.append(f'| {row["runtime"]} | not measured: {row["not_measured"]} | | | |')
            else:
                figures = ' | '.join(f'{row[key] * 1e3:.2f}' for key in ('median', 'p90', 'p99'))
                lines.append(f'| {row["runtime"]} | {figures} | {row["images_per_second"]:.1f} |')
    elif rows[0].get('ours_bytes') is not None:
        lines = [
            '| what | ours, ms | peer, ms | peer | ratio | ours, MB | peer, MB | linear layers, ms | ratio without |',
            '|---|---:|---:|---|---:|---:|---:|---:|---:|',
        ]
        lines += [
            f'| {row["name"]} | {row["ours"] * 1e3:.2f} | {row["peer"] * 1e3:.2f} | {row["peer_name"]} '
            f'| {row["ratio"]:.2f} | {row["ours_bytes"] / 1e6:.1f} | {row["peer_bytes"] / 1e6:.1f} '
            f'| {row["shared"] * 1e3:.2f} | {(row["peer"] - row["shared"]) / (row["ours"] - row["shared"]):.2f} |'
            for row in rows
        ]
    elif rows[0].get('floor_bytes') is not None:
        lines = [
            f'| what ({rows[0]["device"]}) | ours, ms | peer, ms | peer | ratio | floor, MB | floor, GFLOP '
            '| of copy bandwidth |',
            '|---|---:|---:|---|---:|---:|---:|---:|',
        ]
        for row in rows:
            share = '' if row['bandwidth_share'] is None else f'{row["bandwidth_share"]:.0%}'
            lines.append(
                f'| {row["name"]} | {row["ours"] * 1e3:.3f} | {row["peer"] * 1e3:.3f} | {row["peer_name"]} '
                f'| {row["ratio"]:.2f} | {row["floor_bytes"] / 1e6:.2f} | {row["floor_operations"] / 1e9:.3f} '
                f'| {share} |'
            )
    elif 'ratio' in rows[0]:
        lines = ['| what | ours, ms | peer, ms | peer | ratio |', '|---|---:|---:|---|---:|']
        lines += [
            f'| {row["name"]} | {row["ours"] * 1e3:.2f} | {row["peer"] * 1e3:.2f} | {row["peer_name"]} '
            f'| {row["ratio"]:.2f} |'
            for row in rows
        ]
        if len(rows) > 1:
            lines.append(f'| geometric mean | | | | {geometric_mean([row["ratio"] for row in rows]):.2f} |')
    else:
        lines = ['| task | metric | ours | peer | peer backbone | seconds |', '|---|---|---:|---:|---|---:|']
        lines += [
            f'| {row["task"]} | {row["metric"]} | {row["ours"]:.3f} | {row["peer"]:.3f} | {row["peer_name"]} '
            f'| {row["ours_seconds"]:.0f} and {row["peer_seconds"]:.0f} |'
            for row in rows
        ]
    return '\n'.join(lines)


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    argv = ['cost' if argument == '--cost' else argument for argument in (sys.argv[1:] if argv is None else argv)]
    options = vars(parser().parse_args(argv))
    as_json = options.pop('json')
    with contextlib.redirect_stdout(sys.stderr):  # training logs; standard output is the table's alone
        rows = measure(options)
    print(json.dumps(rows, indent=2) if as_json else table(rows))
    return 0


if __name__ == '__main__':
    sys.exit(main())
