"""int8 by post-training quantization, on onnxruntime's quantizer, with Q/DQ pairs where TensorRT wants them.

Inputs of convolutions and linear layers get a symmetric Q/DQ pair each, weights one per output channel, biases and
outputs none; products of two activations (attention) stay as they are. Ranges come from calibration images.
"""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .onnx import replacing, require
from .parity import OnnxModel, compare

RANGES = ('minmax', 'entropy', 'percentile')
OPERATORS = ('Conv', 'MatMul', 'Gemm')


def quantize(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    images: Iterable[Tensor],
    *,
    ranges: str = 'minmax',
    operators: Sequence[str] = OPERATORS,
    exclude: Sequence[str] = (),
    measured: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes an int8 (Q/DQ) form of a float32 ONNX file.

    Args:
        source: the float32 file, of one input.
        path: of the int8 file.
        images: calibration batches, as the model takes them.
        ranges: 'minmax', 'entropy' (least information lost) or 'percentile' (99.99 % of the values inside).
        operators: kinds of nodes to quantize.
        exclude: names of nodes that stay in float32.
        measured: file of the ranges: read if it is there, else written, so that trials measure once. Ignored by
            versions of onnxruntime that cannot.

    Returns:
        The path.

    Raises:
        ValueError: an unknown kind of range, or no calibration images.  ImportError: onnxruntime is not installed.
    """
    require('onnx', 'onnxruntime')
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if ranges not in RANGES:
        raise ValueError(f'ranges must be one of {", ".join(RANGES)}, got {ranges=}')
    graph = onnx.load(str(source), load_external_data=False)
    name, wanted = graph.graph.input[0].name, quantizable(source, operators)
    batches = [{name: batch.detach().cpu().float().contiguous().numpy()} for batch in images]
    if not batches:
        raise ValueError('calibration needs at least one image, got none')

    cache: dict[str, Any] = {}
    if measured is not None and 'calibration_cache_path' in inspect.signature(quantize_static).parameters:
        cache['calibration_cache_path'] = os.fspath(measured)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Any:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as scratch, replacing(path) as unfinished:
        prepared = Path(scratch) / 'prepared.onnx'
        # Shapes alone: the float graph is already what we want, and its nodes keep the names that `exclude` uses.
        quant_pre_process(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(unfinished),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            **cache,
            nodes_to_exclude=[n for n in _named(graph.graph, operators) if n not in wanted or n in exclude],
            calibrate_method={
                'minmax': CalibrationMethod.MinMax,
                'entropy': CalibrationMethod.Entropy,
                'percentile': CalibrationMethod.Percentile,
            }[ranges],
            extra_options={
                'ActivationSymmetric': True,
                'WeightSymmetric': True,
                'QuantizeBias': False,
                'DedicatedQDQPair': True,
                'OpTypesToExcludeOutputQuantization': list(operators),
            },
        )
        written = onnx.load(str(unfinished))
        for entry in written.metadata_props:
            if entry.key == 'precision':
                entry.value = 'int8'
                break
        else:
            written.metadata_props.add(key='precision', value='int8')
        onnx.save(written, str(unfinished))
    return Path(path)


def sensitivity(
    source: str | os.PathLike[str], images: Sequence[Tensor], *, ranges: str = 'minmax'
) -> list[tuple[str, float]]:
    """What each quantizable node costs when it alone is quantized: 1 - cosine of the outputs, their mean, worst first.

    Args:
        source: the float32 file.
        images: batches to calibrate and to compare on.
        ranges: see `quantize`.
    """
    nodes = quantizable(source)
    original = OnnxModel(source)
    expected = [original(batch) for batch in images]
    costs = []
    with tempfile.TemporaryDirectory() as scratch:
        for node in nodes:
            alone = Path(scratch) / 'alone.onnx'
            others = [other for other in nodes if other != node]
            quantize(source, alone, images, ranges=ranges, exclude=others, measured=Path(scratch) / 'ranges.json')
            model = OnnxModel(alone)
            rows = [row for x, y in zip(images, expected) for row in compare(model.outputs, model(x), y)]
            costs.append((node, 1 - sum(row.cosine for row in rows) / len(rows)))
    return sorted(costs, key=lambda entry: -entry[1])


def quantize_within(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    images: Sequence[Tensor],
    metric: Callable[[Any], float],
    *,
    budget: float,
    ranges: str = 'minmax',
    step: int = 1,
) -> list[str]:
    """Quantizes as much as a metric allows: the most sensitive nodes stay in float32, `step` more at a time.

    Args:
        source, path, images, ranges: see `quantize`.
        metric: of a callable model (see `parity.OnnxModel`); higher is better.
        budget: how much of the float32 file's metric may be lost, in its own unit.
        step: nodes added to the float32 ones per trial.

    Returns:
        The nodes that stayed in float32.

    Raises:
        ValueError: the budget is not met by any.
    """
    if budget < 0 or step < 1:
        raise ValueError(f'budget must not be negative and step must be positive, got {budget=}, {step=}')
    wanted = metric(OnnxModel(source)) - budget
    ranked: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, replacing(path) as unfinished:
        for count in range(0, len(quantizable(source)), step):
            if count and not ranked:
                ranked = [node for node, _ in sensitivity(source, images, ranges=ranges)]
            measured = Path(scratch) / 'ranges.json'
            quantize(source, unfinished, images, ranges=ranges, exclude=ranked[:count], measured=measured)
            reached = metric(OnnxModel(unfinished))
            if reached >= wanted:
                return ranked[:count]
        raise ValueError(f'int8 keeps the metric at {reached:.4g}, below {wanted:.4g}, whatever stays in float32')


def quantizable(source: str | os.PathLike[str], operators: Sequence[str] = OPERATORS) -> list[str]:
    """Names of the nodes that `quantize` would quantize: those of the given kinds that have weights."""
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [name for name, node in _named(graph, operators).items() if node.input[1] in weights]


def _named(graph: Any, operators: Sequence[str]) -> dict[str, Any]:
    return {node.name: node for node in graph.node if node.op_type in operators}
