"""Write a trained task or a backbone for another runtime: `densezoo export CONFIG CHECKPOINT`, or `--model NAME`.

densezoo export quickstart/classification best.pth                                # ONNX, float32, batches of any size
densezoo export quickstart/detection best.pth --nms --evaluate                    # suppression inside, mAP of the file
densezoo export quickstart/segmentation best.pth --precision fp16 --format engine
densezoo export quickstart/segmentation best.pth --precision int8 --calibrate photos/ --budget 0.5
densezoo export --model caformer_s18 --features --dynamic-size                    # a backbone alone, as a pyramid

Formats: 'onnx' (a file that is checked and compared with PyTorch on the spot), 'engine' (TensorRT, through ONNX),
'program' (torch.export, .pt2), 'aoti' (compiled by AOTInductor, .pt2: no other runtime than torch).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densezoo.tools.common import report_errors

ENDINGS = {'onnx': '.onnx', 'engine': '.engine', 'program': '.pt2', 'aoti': '.pt2'}
TOLERANCE = {'fp32': 1e-4, 'fp16': 2e-2, 'int8': 1.0}  # of max rel; onnxruntime has no bfloat16 on CPUs


@dataclass
class Source:
    """What is exported: the model, the file's metadata, a name, and for a task its config and pictures to try it on."""

    model: Any
    entries: dict[str, Any]
    name: str
    size: Callable[[], tuple[int, int]]
    config: Any = None
    predict: Any = None  # the trained task on samples
    pictures: list[Any] = field(default_factory=list)

    @property
    def detects(self) -> bool:
        return 'boxes' in self.model.outputs


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog='densezoo export', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument('config', nargs='?', help='a config file or a name such as quickstart/detection')
    arguments.add_argument('checkpoint', nargs='?', help='best.pth or last.pth of a run')
    arguments.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='overrides of the config')
    arguments.add_argument('--model', help='a backbone alone, by name, instead of a config')
    arguments.add_argument('--weights', help='checkpoint of --model (default: random weights)')
    arguments.add_argument('--features', action='store_true', help='--model as a pyramid instead of a classifier')
    arguments.add_argument('--format', choices=tuple(ENDINGS), default='onnx')
    arguments.add_argument('--precision', choices=('fp32', 'fp16', 'bf16', 'int8'), default='fp32')
    arguments.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help="default: the validation data's")
    arguments.add_argument('--batch', type=int, nargs=3, default=(1, 4, 8), metavar=('MIN', 'OPT', 'MAX'))
    arguments.add_argument('--static-batch', type=int, help='one batch size alone, in the graph')
    arguments.add_argument('--dynamic-size', action='store_true', help='any height and width in the graph')
    arguments.add_argument(
        '--size-range', type=int, nargs=3, metavar=('MIN', 'OPT', 'MAX'), help="of the engine's profile"
    )
    arguments.add_argument('--logits', action='store_true', help="segmentation: logits instead of the classes' mask")
    arguments.add_argument(
        '--nms', action='store_true', help='detection: results instead of candidates (engines: as matrix products)'
    )
    arguments.add_argument(
        '--evaluate', action='store_true', help="metrics of the file on the config's validation data"
    )
    arguments.add_argument('--calibrate', help='folder of images: int8 ranges, and layers that fp16 cannot hold')
    arguments.add_argument(
        '--calibration-images', type=int, default=64, help='of the folder at most, spread over it (default: 64)'
    )
    arguments.add_argument('--ranges', choices=('minmax', 'entropy', 'percentile'), default='minmax')
    arguments.add_argument(
        '--budget',
        type=float,
        metavar='POINTS',
        help='int8: keep layers in float32 until the first metric loses at most so much (0.5: of 100; dB as they are)',
    )
    arguments.add_argument('--keep-float32', nargs='+', default=[], help='modules that stay in float32 under fp16')
    arguments.add_argument('--autocast', action='store_true', help='fp16, bf16: let NVIDIA ModelOpt choose the layers')
    arguments.add_argument('--timing-cache', help="file of TensorRT's measurements, read and extended")
    arguments.add_argument('--workspace', type=int, metavar='MIB', help="memory of TensorRT's layers")
    arguments.add_argument('--out', help='file to write (default: named after the model, here)')
    return arguments


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if bool(options.model) == bool(options.config and options.checkpoint):
        raise ValueError('pass CONFIG and CHECKPOINT, or --model NAME')
    if options.precision == 'int8' and not options.calibrate:
        raise ValueError('--precision int8 needs --calibrate FOLDER: ranges are measured on images')
    if options.format in ('program', 'aoti') and options.precision == 'int8':
        raise ValueError(f'--format {options.format} has no int8; use onnx or engine')
    if options.calibration_images < 1:
        raise ValueError(f'--calibration-images must be at least 1, got {options.calibration_images}')
    if options.budget is not None and (options.precision != 'int8' or options.model):
        raise ValueError('--budget is for --precision int8 of a CONFIG, whose metric it measures')
    if options.evaluate and (options.model or options.format in ('program', 'aoti')):
        raise ValueError('--evaluate is for --format onnx or engine of a CONFIG, whose metrics it measures')
    if options.autocast and options.precision not in ('fp16', 'bf16'):
        raise ValueError('--autocast is for --precision fp16 or bf16')
    if options.static_batch is not None and options.static_batch < 1:
        raise ValueError(f'--static-batch must be at least 1, got {options.static_batch}')


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    check(options)
    import torch

    from densezoo.deploy import fuse_for_deploy

    source = _backbone(options) if options.model else _task(options)
    source.model = fuse_for_deploy(source.model)
    height, width = options.size or source.size()
    images = list(_calibration(options, source.entries, height, width)) if options.calibrate else []
    pictures = [x for x in source.pictures if tuple(x.shape[-2:]) == (height, width)]
    if images or pictures:
        example = images[0][:2] if images else torch.stack(pictures)
    else:
        channels = 4 if source.entries.get('holes') else 3
        example = torch.rand(2, channels, height, width) * (255 if source.entries['range'] == '0..255' else 1)
    if options.static_batch:
        example = example[:1].repeat(options.static_batch, 1, 1, 1)
    out = Path(options.out or f'{source.name}_{options.precision}{ENDINGS[options.format]}')
    source.entries['precision'] = options.precision
    if options.dynamic_size and options.size_range:
        source.entries['size_range'] = [options.size_range[0], options.size_range[2]]
    writer = {'onnx': _write_onnx, 'engine': _write_engine}.get(options.format, _write_program)
    writer(options, source, example, images, out)
    print(f'written: {out} ({out.stat().st_size / 2**20:.1f} MiB)')
    return 0


def _backbone(options: argparse.Namespace) -> Source:
    from densezoo.backbones import create_model

    model: Any = create_model(options.model, features_only=options.features, checkpoint_path=options.weights or '')
    side = model.default_cfg.get('input_size', (3, 224, 224))[-1]
    # weights of a classifier take normalised images
    entries = {'range': 'normalised', 'channels': 'RGB', **{key: model.default_cfg[key] for key in ('mean', 'std')}}
    model.outputs = () if options.features else ('logits',)
    return Source(model.eval(), entries, options.model.replace('.', '_'), lambda: (side, side))


def _task(options: argparse.Namespace) -> Source:
    from densezoo.train import load_config
    from densezoo.train.deployable import Deployable, metadata
    from densezoo.train.inference import Predictor

    config = load_config(options.config, options.cfg_options)
    predictor = Predictor(config, options.checkpoint, device='cpu')
    nms = None if not options.nms else 'operator' if options.format == 'onnx' else 'products'
    model = Deployable(predictor.task, form='logits' if options.logits else 'mask', nms=nms).eval()
    entries = metadata(predictor.task, predictor.metainfo, nms)
    entries['config'] = str(options.config)
    if options.dynamic_size and 'decoding' in entries:
        raise ValueError(
            f'--dynamic-size: {type(predictor.task.head).__name__} has as many candidates as the size gives it, '
            'which no graph of fixed shapes follows; export once per size'
        )
    source = Source(model, entries, Path(str(options.config)).stem, lambda: (0, 0), config, predictor)
    source.size = lambda: _validation_size(source)
    return source


def _validation_size(source: Source) -> tuple[int, int]:
    """Height and width of the first validation image, padded as the task pads it; the first images are kept."""
    import torch
    from mmengine.registry import DATASETS

    try:
        dataset = DATASETS.build(source.config.val_dataloader.dataset)
        images = [dataset[i]['image'].as_subclass(torch.Tensor) for i in range(min(2, len(dataset)))]
    except (OSError, ValueError) as error:
        raise ValueError(f'pass --size H W: the validation data cannot tell it ({error})') from None
    divisor = source.entries['divisor']
    height, width = (-(-side // divisor) * divisor for side in images[0].shape[-2:])
    largest = 255 if source.entries['range'] == '0..255' else 1
    for image in images:
        scale = largest / 255 if not image.is_floating_point() else 1
        pad = [0, width - image.shape[-1], 0, height - image.shape[-2]]
        if min(pad) >= 0:
            source.pictures.append(torch.nn.functional.pad(image.float() * scale, pad))
    return height, width


def _calibration(
    options: argparse.Namespace, entries: dict[str, Any], height: int, width: int, batch: int = 4
) -> Iterator[Any]:
    """Batches of the folder's images at the exported size, in the model's range of values."""
    import torch
    from torchvision.transforms.v2 import functional as transforms

    from densezoo.data import read_image
    from densezoo.tools.predict import batches, find_images

    found = find_images([options.calibrate])
    chosen = found[:: max(1, -(-len(found) // options.calibration_images))]  # spread over the folder
    for files in batches(chosen, batch):
        pixels = [
            transforms.resize(read_image(file).as_subclass(torch.Tensor).float(), [height, width], antialias=True)
            for file in files
        ]
        stacked = torch.stack(pixels)
        if entries['range'] == 'normalised':
            mean, std = (torch.tensor(entries[key]).view(3, 1, 1) for key in ('mean', 'std'))
            yield (stacked / 255 - mean) / std
        else:
            yield stacked if entries['range'] == '0..255' else stacked / 255


def _write_onnx(options: argparse.Namespace, source: Source, example: Any, images: list[Any], out: Path) -> None:
    from densezoo.deploy import Half, autocast, export_onnx, out_of_range, quantize
    from densezoo.deploy.onnx import summarise_operators

    graph, half = source.model, options.precision in ('fp16', 'bf16')
    if half and not options.autocast:
        found = out_of_range(graph, images, precision=options.precision) if images else {}
        if found:
            print(f'stays in float32: {", ".join(found)}')
        graph = Half(graph, options.precision, keep=[*options.keep_float32, *found])
    converted = options.precision == 'int8' or options.autocast
    plain = out.with_suffix('.fp32.onnx') if converted else out
    try:
        export_onnx(
            graph,
            example,
            plain,
            outputs=list(source.model.outputs) or None,
            dynamic_batch=not options.static_batch,
            dynamic_size=options.dynamic_size,
            metadata=source.entries,
        )
        if options.autocast:
            autocast(plain, out, precision=options.precision, image=example)
        elif options.precision == 'int8' and options.budget is not None:
            _quantize_within(options, source, plain, out, images)
        elif options.precision == 'int8':
            quantize(plain, out, images, ranges=options.ranges)
    finally:
        if converted:
            plain.unlink(missing_ok=True)
    print(summarise_operators(out))
    if options.precision in TOLERANCE:
        _compare(options, source, out, example)
    if options.evaluate:
        _evaluate(source, out)


def _quantize_within(options: argparse.Namespace, source: Source, plain: Path, out: Path, images: list[Any]) -> None:
    from densezoo.deploy import quantize_within
    from densezoo.deploy.quantize import quantizable
    from densezoo.train.deployed import DeployedTask, evaluate

    name = ''

    def metric(model: Any) -> float:
        nonlocal name
        found = evaluate(source.config, DeployedTask(model))
        name = next(iter(found))
        print(f'{name} {found[name]:.4g}: {"float32" if model.path == plain else "int8"}')
        return found[name] * (1 if name.startswith('psnr') else 100)

    step = max(1, len(quantizable(plain)) // 16)
    kept = quantize_within(plain, out, images, metric, budget=options.budget, ranges=options.ranges, step=step)
    print(f'stays in float32: {", ".join(kept)}' if kept else 'every layer is in int8')


def _compare(options: argparse.Namespace, source: Source, out: Path, example: Any) -> None:
    """Prints how far the file's outputs are from the model's."""
    import torch

    from densezoo.deploy import OnnxModel, check_onnx, match_boxes
    from densezoo.deploy.parity import as_table

    if source.detects:  # candidates of nearly equal scores come in any order: box by box instead of row by row
        with torch.no_grad():
            found = match_boxes(OnnxModel(out)(example), source.model(example))
        print(
            f'{found.matched} of {found.boxes} boxes matched, differing by at most {found.pixels:.2g} pixels and '
            f'{found.score:.2g} in score'
        )
        if options.precision != 'int8' and found.matched < 0.98 * found.boxes:
            print('warning: the file finds other boxes than PyTorch', file=sys.stderr)
        return
    rows = check_onnx(source.model, out, example)
    print(as_table(rows))
    worst = max(row.max_rel for row in rows)
    if worst > TOLERANCE[options.precision]:
        print(f'warning: outputs differ by {worst:.2g} of their range from PyTorch', file=sys.stderr)


def _evaluate(source: Source, file: Path) -> None:
    from densezoo.tools.common import open_deployed
    from densezoo.train.deployed import evaluate

    ours, theirs = evaluate(source.config, open_deployed(str(file))), evaluate(source.config, source.predict)
    lines = [f'| metric | {file.name} | PyTorch |', '|---|---:|---:|']
    lines += [f'| {name} | {ours[name]:.4g} | {value:.4g} |' for name, value in theirs.items() if value != -1]
    print('\n'.join(lines))


def _write_engine(options: argparse.Namespace, source: Source, example: Any, images: list[Any], out: Path) -> None:
    from densezoo.deploy import build_engine

    graph = out.with_suffix('.onnx')
    _write_onnx(options, source, example, images, graph)
    report = build_engine(
        graph,
        out,
        batch=tuple(options.batch),
        size=tuple(options.size_range) if options.size_range else None,
        timing_cache=options.timing_cache,
        workspace=options.workspace * 2**20 if options.workspace else None,
    )
    warnings = f', {len(report["warnings"])} warnings (in the JSON file)' if report['warnings'] else ''
    print(f'{report["compiler"]} {report["version"]}: {report["layers"]} layers{warnings}')


def _write_program(options: argparse.Namespace, source: Source, example: Any, images: list[Any], out: Path) -> None:
    import torch

    from densezoo.deploy import Half, export_program
    from densezoo.deploy.onnx import replacing

    model = source.model
    graph = Half(model, options.precision, keep=options.keep_float32) if options.precision != 'fp32' else model
    program = export_program(graph, example, dynamic_batch=not options.static_batch, dynamic_size=options.dynamic_size)
    with replacing(out) as unfinished:
        if options.format == 'aoti':
            torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        else:
            torch.export.save(program, unfinished)


if __name__ == '__main__':
    sys.exit(main())
