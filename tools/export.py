"""Write a trained task or a backbone for another runtime: `densezoo export CONFIG CHECKPOINT`, or `--model NAME`.

densezoo export quickstart/classification best.pth                                # ONNX, float32, batches of any size
densezoo export quickstart/segmentation best.pth --precision fp16 --format engine
densezoo export quickstart/classification best.pth --precision int8 --calibrate photos/
densezoo export --model caformer_s18 --features --dynamic-size                    # a backbone alone, as a pyramid

Formats: 'onnx' (a file that is checked and compared with PyTorch on the spot), 'engine' (TensorRT, through ONNX),
'program' (torch.export, .pt2), 'aoti' (compiled by AOTInductor, .pt2: no other runtime than torch).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from densezoo.tools.common import report_errors

ENDINGS = {'onnx': '.onnx', 'engine': '.engine', 'program': '.pt2', 'aoti': '.pt2'}
TOLERANCE = {'fp32': 1e-4, 'fp16': 2e-2, 'int8': 1.0}  # of max rel; onnxruntime has no bfloat16 on CPUs


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
    arguments.add_argument('--calibrate', help='folder of images: int8 ranges, and layers that fp16 cannot hold')
    arguments.add_argument('--ranges', choices=('minmax', 'entropy', 'percentile'), default='minmax')
    arguments.add_argument('--keep-float32', nargs='+', default=[], help='modules that stay in float32 under fp16')
    arguments.add_argument('--timing-cache', help="file of TensorRT's measurements, read and extended")
    arguments.add_argument('--out', help='file to write (default: named after the model, here)')
    return arguments


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if bool(options.model) == bool(options.config and options.checkpoint):
        raise ValueError('pass CONFIG and CHECKPOINT, or --model NAME')
    if options.precision == 'int8' and not options.calibrate:
        raise ValueError('--precision int8 needs --calibrate FOLDER: ranges are measured on images')
    if options.format in ('program', 'aoti') and options.precision == 'int8':
        raise ValueError(f'--format {options.format} has no int8; use onnx or engine')
    import torch

    from densezoo.deploy import fuse_for_deploy

    model, entries, name, size = _backbone(options) if options.model else _task(options)
    model = fuse_for_deploy(model)
    height, width = options.size or size()
    images = list(_calibration(options, entries, height, width)) if options.calibrate else []
    largest = 255 if entries['range'] == '0..255' else 1
    example = images[0][:2] if images else torch.rand(2, 3, height, width) * largest
    if options.static_batch:
        example = example[:1].repeat(options.static_batch, 1, 1, 1)
    out = Path(options.out or f'{name}_{options.precision}{ENDINGS[options.format]}')
    entries['precision'] = options.precision
    if options.dynamic_size and options.size_range:
        entries['size_range'] = [options.size_range[0], options.size_range[2]]
    writer = {'onnx': _write_onnx, 'engine': _write_engine}.get(options.format, _write_program)
    writer(options, model, example, images, out, entries)
    print(f'written: {out} ({out.stat().st_size / 2**20:.1f} MiB)')
    return 0


_Source = tuple[Any, dict[str, Any], str, Callable[[], tuple[int, int]]]  # model, metadata, name, its usual size


def _backbone(options: argparse.Namespace) -> _Source:
    from densezoo.backbones import create_model

    model: Any = create_model(options.model, features_only=options.features, checkpoint_path=options.weights or '')
    side = model.default_cfg.get('input_size', (3, 224, 224))[-1]
    # weights of a classifier take normalised images: mean and std are in the metadata
    entries = {'range': 'normalised', 'channels': 'RGB'}
    model.outputs = () if options.features else ('logits',)
    return model.eval(), entries, options.model.replace('.', '_'), lambda: (side, side)


def _task(options: argparse.Namespace) -> _Source:
    from densezoo.train import load_config
    from densezoo.train.deployable import Deployable, metadata
    from densezoo.train.inference import Predictor

    config = load_config(options.config, options.cfg_options)
    predictor = Predictor(config, options.checkpoint, device='cpu')
    model = Deployable(predictor.task, form='logits' if options.logits else 'mask').eval()
    entries = metadata(predictor.task, predictor.metainfo)
    entries['config'] = str(options.config)
    divisor = predictor.task.data_preprocessor.divisor
    return model, entries, Path(str(options.config)).stem, lambda: _validation_size(config, divisor)


def _validation_size(config: Any, divisor: int) -> tuple[int, int]:
    """Height and width of the first validation image, padded as the task pads it."""
    from mmengine.registry import DATASETS

    try:
        image = DATASETS.build(config.val_dataloader.dataset)[0]['image']
    except (OSError, ValueError) as error:
        raise ValueError(f'pass --size H W: the validation data cannot tell it ({error})') from None
    height, width = (-(-side // divisor) * divisor for side in image.shape[-2:])
    return height, width


def _calibration(
    options: argparse.Namespace, entries: dict[str, Any], height: int, width: int, batch: int = 4
) -> Iterator[Any]:
    """Batches of the folder's images at the exported size, in the model's range of values."""
    import torch
    from torchvision.transforms.v2 import functional as transforms

    from densezoo.data import read_image
    from densezoo.tools.predict import batches, find_images

    for files in batches(find_images([options.calibrate]), batch):
        pixels = [
            transforms.resize(read_image(file).as_subclass(torch.Tensor).float(), [height, width], antialias=True)
            for file in files
        ]
        stacked = torch.stack(pixels)
        if entries['range'] == 'normalised':
            mean, std = (torch.tensor(entries.get(key, default)).view(3, 1, 1) for key, default in _IMAGENET.items())
            yield (stacked / 255 - mean) / std
        else:
            yield stacked if entries['range'] == '0..255' else stacked / 255


_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}


def _write_onnx(
    options: argparse.Namespace, model: Any, example: Any, images: list[Any], out: Path, entries: dict[str, Any]
) -> None:
    from densezoo.deploy import Half, check_onnx, export_onnx, out_of_range, quantize
    from densezoo.deploy.parity import as_table

    outputs = list(model.outputs) or None
    graph = model
    if options.precision in ('fp16', 'bf16'):
        found = out_of_range(model, images, precision=options.precision) if images else {}
        if found:
            print(f'stays in float32: {", ".join(found)}')
        graph = Half(model, options.precision, keep=[*options.keep_float32, *found])
    source = out.with_suffix('.fp32.onnx') if options.precision == 'int8' else out
    export_onnx(
        graph,
        example,
        source,
        outputs=outputs,
        dynamic_batch=not options.static_batch,
        dynamic_size=options.dynamic_size,
        metadata=entries,
    )
    if options.precision == 'int8':
        quantize(source, out, images, ranges=options.ranges)
        source.unlink()
    if options.precision in TOLERANCE:
        rows = check_onnx(model, out, example)
        print(as_table(rows))
        worst = max(row.max_rel for row in rows)
        if worst > TOLERANCE[options.precision] and out.suffix == '.onnx':
            print(f'warning: outputs differ by {worst:.2g} of their range from PyTorch', file=sys.stderr)


def _write_engine(
    options: argparse.Namespace, model: Any, example: Any, images: list[Any], out: Path, entries: dict[str, Any]
) -> None:
    from densezoo.deploy import build_engine

    graph = out.with_suffix('.onnx')
    _write_onnx(options, model, example, images, graph, entries)
    report = build_engine(
        graph,
        out,
        batch=tuple(options.batch),
        size=tuple(options.size_range) if options.size_range else None,
        timing_cache=options.timing_cache,
    )
    warnings = f', {len(report["warnings"])} warnings (in the JSON file)' if report['warnings'] else ''
    print(f'{report["compiler"]} {report["version"]}: {report["layers"]} layers{warnings}')


def _write_program(
    options: argparse.Namespace, model: Any, example: Any, images: list[Any], out: Path, entries: dict[str, Any]
) -> None:
    import torch

    from densezoo.deploy import Half, export_program
    from densezoo.deploy.onnx import replacing

    graph = Half(model, options.precision, keep=options.keep_float32) if options.precision != 'fp32' else model
    program = export_program(graph, example, dynamic_batch=not options.static_batch, dynamic_size=options.dynamic_size)
    with replacing(out) as unfinished:
        if options.format == 'aoti':
            torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        else:
            torch.export.save(program, unfinished)


if __name__ == '__main__':
    sys.exit(main())
