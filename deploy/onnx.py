"""Models as ONNX files: plain operators alone, checked, described in their own metadata, written whole or not."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import quantized_layers  # noqa: F401  its operators become Q/DQ pairs
from .export import export_program

OPSET = 18  # what the parsers of TensorRT 10 and 11 both read in full
OPSET_BF16 = 22  # the first whose convolutions and pooling know bfloat16; TensorRT 11
# Notes of the exporter on each node that are left out: lines of source files with their paths on this machine, and what
# the node's name and namespace say already. Together they are larger than a packed model's weights.
TRACES = ('pkg.torch.onnx.stack_trace', 'pkg.torch.onnx.class_hierarchy', 'pkg.torch.onnx.fx_node')


def export_onnx(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    inputs: Sequence[str] = ('images',),
    outputs: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    min_size: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    opset: int | None = None,
) -> Path:
    """Writes the inference graph of a model as one ONNX file.

    Args:
        model, example, dynamic_batch, dynamic_size, min_size: see `export_program`.
        path: of the file; an older one is replaced when the new one is complete.
        inputs, outputs: names; outputs are 'output' or 'output0', 'output1', ... if None.
        metadata: entries of the file's own metadata (strings as they are, the rest as JSON), besides densezoo's
            version, the layout and the strides.
        opset: version of the operators; None takes the oldest that has them all.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is not installed.  ValueError: names do not fit, or as `export_program`.
    """
    require('onnx', 'onnxscript')
    import onnx

    program = export_program(model, example, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size, min_size=min_size)
    _keep_small_addends(program.graph)
    count = len(program.graph_signature.user_outputs)
    if outputs is None:
        outputs = ['output'] if count == 1 else [f'output{i}' for i in range(count)]
    given = len(program.graph_signature.user_inputs)
    if len(outputs) != count or len(inputs) != given:
        raise ValueError(
            f'the model has {given} inputs and {count} outputs, got inputs={list(inputs)}, outputs={list(outputs)}'
        )
    halves = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    packed = any(buffer.dtype == torch.int32 for buffer in model.buffers())
    exported = torch.onnx.export(
        program,
        input_names=list(inputs),
        output_names=list(outputs),
        opset_version=opset if opset is not None else OPSET_BF16 if halves else OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
        optimize=not packed,
        custom_translation_table=_operators(),
    )
    assert exported is not None
    if packed:
        _optimize_but_words(exported.model)
    lowest = {}
    if dynamic_size:
        lowest['min_size'] = min_size if min_size is not None else int(getattr(model, 'min_dynamic_size', 32))
    for key, value in {**_described(model), **lowest, **(metadata or {})}.items():
        exported.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    for node in exported.model.graph:
        for key in TRACES:
            node.metadata_props.pop(key, None)
    with replacing(path) as unfinished:
        exported.save(str(unfinished))
        onnx.checker.check_model(str(unfinished), full_check=True)
    return Path(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of an ONNX file; what was JSON is parsed.

    Raises:
        ValueError: not an ONNX file.
    """
    require('onnx')
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        raise ValueError(f'{os.fspath(path)} is not an ONNX file') from None
    return {entry.key: _parsed(entry.value) for entry in model.metadata_props}


def count_operators(path: str | os.PathLike[str]) -> dict[str, int]:
    """How often each operator occurs in an ONNX file, most frequent first."""
    require('onnx')
    import collections

    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return dict(collections.Counter(node.op_type for node in nodes).most_common())


def summarise_operators(path: str | os.PathLike[str]) -> str:
    """One line about the size of a graph, and how many of its operators only move or convert data."""
    counts = count_operators(path)
    moving = ', '.join(f'{counts.get(name, 0)} {name}' for name in ('Cast', 'Transpose', 'Reshape'))
    return f'{sum(counts.values())} operators, of them {moving}'


def require(*modules: str) -> None:
    """Raises ImportError that names the extra to install, unless all modules are there."""
    import importlib.util

    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not found: pip install 'densezoo[export]'")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place at the end of the block, or is removed after an error."""
    final = Path(path)
    if not final.parent.is_dir():
        raise FileNotFoundError(f'no such folder: {final.parent}')
    handle, name = tempfile.mkstemp(prefix=f'.{final.stem}.', suffix=final.suffix, dir=final.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, 'rb') as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's files are the owner's alone
        os.replace(name, final)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _optimize_but_words(model: Any) -> None:
    """The exporter's own optimization, which would unpack small layers' words in part and store that, eight bytes for
    each field."""
    import onnx_ir
    from onnxscript.optimizer import optimize_ir

    def should_fold(node: Any) -> bool | None:
        words = node.inputs[0].const_value if node.op_type == 'Cast' and node.inputs else None
        return False if words is not None and words.dtype == onnx_ir.DataType.INT32 and len(words.shape) > 1 else None

    optimize_ir(model, should_fold=should_fold)


def _keep_small_addends(graph: torch.fx.Graph) -> None:
    """Numbers that guard divisions survive: onnxscript takes scalars up to 1e-8 for zero and drops the addition."""
    for node in graph.find_nodes(op='call_function', target=torch.ops.aten.add.Tensor):
        x, addend = node.args
        if isinstance(addend, float) and 0 < abs(addend) < 1e-7:
            like = node.meta['val']
            with graph.inserting_before(node):
                options = {'dtype': like.dtype, 'device': like.device}
                one = graph.call_function(torch.ops.aten.full.default, ([1], addend), options)
            one.meta['val'] = like.new_full((1,), addend)
            node.args = (x, one)


def _operators() -> dict[Any, Any]:
    """What operators of our own become."""
    import onnxscript

    op: Any = onnxscript.opset18

    def suppress(boxes: Any, scores: Any, threshold: float) -> Any:
        plenty = op.Constant(value_ints=[2**31 - 1])
        limit = op.Constant(value_floats=[threshold])
        chosen = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])), plenty, limit)
        index = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # picture and box, (n, 2)
        yes = op.Expand(op.Constant(value_ints=[1]), op.Shape(chosen, start=0, end=1))
        none = op.Expand(op.Constant(value_ints=[0]), op.Shape(scores))
        return op.Cast(op.ScatterND(none, index, yes), to=9)  # to bool

    def quantize(x: Any, scale: Any, zero: Any, axis: int) -> Any:
        return op.QuantizeLinear(x, scale, zero, axis=axis)

    def dequantize(x: Any, scale: Any, zero: Any, axis: int) -> Any:
        return op.DequantizeLinear(x, scale, zero, axis=axis)

    def clip(x: Any, low: Any, high: Any) -> Any:
        if low.shape is not None and len(low.shape) == 0:
            return op.Clip(x, low, high)
        return op.Where(op.Less(x, low), low, op.Where(op.Greater(x, high), high, x))

    return {
        torch.ops.densezoo.clip.default: clip,
        torch.ops.densezoo.suppress.default: suppress,
        torch.ops.densezoo.quantize_linear.default: quantize,
        torch.ops.densezoo.dequantize_linear.default: dequantize,
    }


def _described(model: nn.Module) -> dict[str, Any]:
    cfg = getattr(model, 'default_cfg', None) or {}
    entries: dict[str, Any] = {'densezoo': packages.version('densezoo'), 'layout': 'NCHW'}
    for key in ('architecture', 'mean', 'std'):
        if cfg.get(key):
            entries[key] = cfg[key]
    info = getattr(model, 'feature_info', None)
    if getattr(model, 'features_only', False) and info is not None:
        entries['strides'] = list(info.reduction())
    return entries


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
