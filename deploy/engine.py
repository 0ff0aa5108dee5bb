"""Runs TensorRT engines on torch CUDA tensors: no copies, outputs in torch's own memory, CUDA graphs on request.

engine = Engine('model.engine')
logits = engine(images)                      # images: CUDA tensor (B, 3, H, W), B and size within the profile
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    'float': torch.float32,
    'half': torch.float16,
    'bf16': torch.bfloat16,
    'int8': torch.int8,
    'int32': torch.int32,
    'int64': torch.int64,
    'bool': torch.bool,
    'uint8': torch.uint8,
}


class Engine:
    """A TensorRT engine, called as the model was: CUDA tensors in, a tensor or a list of tensors out.

    Attributes:
        report: what was written when the engine was built (compiler, version, profiles, metadata).
        inputs, outputs: names in order.

    Args:
        path: FILE.engine, with FILE.engine.json beside it.
        cuda_graph: record a graph for each set of input shapes and replay it; inputs are copied into its buffers.

    Raises:
        FileNotFoundError: the engine or its description is missing.  ImportError: no TensorRT.
        RuntimeError: no GPU, or the engine was built by another version or for another card.
    """

    def __init__(self, path: str | os.PathLike[str], *, cuda_graph: bool = False):
        self.path, self.report, self.device = Path(path), read_report(path), 'cuda'
        self.metadata: dict[str, Any] = self.report.get('metadata') or {}
        self.inputs = [entry['name'] for entry in self.report['inputs']]
        self.outputs = [entry['name'] for entry in self.report['outputs']]
        self._dtypes = {
            entry['name']: _DTYPES[entry['dtype']] for entry in (*self.report['inputs'], *self.report['outputs'])
        }
        if not torch.cuda.is_available():
            raise RuntimeError(f'{os.fspath(path)} needs a CUDA GPU, and torch finds none')
        trt = _runtime_module(str(self.report['compiler']))
        self._check_version(str(trt.__version__))
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self._engine is None:
            raise RuntimeError(
                f'TensorRT {trt.__version__} cannot read {os.fspath(path)} on {torch.cuda.get_device_name()}: it was '
                f'built by {self.report["compiler"]} {self.report["version"]}; build it again on this machine'
            )
        self._context = self._engine.create_execution_context()
        self._cuda_graph = cuda_graph
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}

    @property
    def shapes(self) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """Smallest and largest shape of the images."""
        entry = self.report['inputs'][0]
        smallest, _, largest = self.report['profiles'].get(entry['name'], (entry['shape'],) * 3)
        return tuple(smallest), tuple(largest)

    def __call__(self, *tensors: Tensor) -> Any:
        """Runs on the current stream of the tensors' device.

        Raises:
            ValueError: number, type, device or shape of the tensors is not what the engine takes.
        """
        check_inputs(self.report, self._dtypes, tensors)
        prepared = [tensor.contiguous() for tensor in tensors]
        results = self._replay(prepared) if self._cuda_graph else self._execute(prepared)
        return results[0] if len(results) == 1 else results

    def _execute(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for name, tensor in zip(self.inputs, tensors):
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        results = []
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            results.append(torch.empty(shape, dtype=self._dtypes[name], device=tensors[0].device))
            self._context.set_tensor_address(name, results[-1].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(tensors[0].device).cuda_stream):
            raise RuntimeError(f'TensorRT failed to run the engine on {[tuple(t.shape) for t in tensors]}')
        return results

    def _replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        key = tuple((tuple(t.shape), t.device) for t in tensors)
        if key not in self._graphs:
            buffers = [tensor.clone() for tensor in tensors]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._execute(buffers)  # TensorRT allocates on the first call, which a graph must not hold
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self._execute(buffers)
            self._graphs[key] = graph, buffers, outputs
        graph, buffers, outputs = self._graphs[key]
        for buffer, tensor in zip(buffers, tensors):
            buffer.copy_(tensor)
        graph.replay()
        return [output.clone() for output in outputs]

    def _check_version(self, here: str) -> None:
        built = str(self.report['version'])
        if built.split('.')[:2] != here.split('.')[:2]:
            raise RuntimeError(
                f'the engine was built by {self.report["compiler"]} {built}, here is {here}; build it again here'
            )


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description that was written beside an engine.

    Raises:
        FileNotFoundError: the engine or its description is missing.
    """
    for file in (Path(path), Path(f'{os.fspath(path)}.json')):
        if not file.is_file():
            raise FileNotFoundError(f'no such file: {file}; `densezoo export --format engine` writes both')
    return json.loads(Path(f'{os.fspath(path)}.json').read_text())


def check_inputs(report: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], tensors: Sequence[Tensor]) -> None:
    """Raises ValueError, naming the input and what is allowed, unless the tensors fit the engine's profile."""
    entries = report['inputs']
    if len(tensors) != len(entries):
        raise ValueError(f'the engine takes {[entry["name"] for entry in entries]}, got {len(tensors)} tensors')
    for entry, tensor in zip(entries, tensors):
        name, shape = entry['name'], tuple(tensor.shape)
        if tensor.device.type != 'cuda' or tensor.dtype != dtypes[name]:
            raise ValueError(f'{name} must be a CUDA tensor of {dtypes[name]}, got {tensor.dtype} on {tensor.device}')
        smallest, _, largest = report['profiles'].get(name, (entry['shape'],) * 3)
        if len(shape) != len(smallest) or any(not a <= n <= b for a, n, b in zip(smallest, shape, largest)):
            raise ValueError(f'{name} must be from {tuple(smallest)} to {tuple(largest)}, got {shape}')


def _runtime_module(compiler: str) -> Any:
    """The TensorRT that can run what `compiler` built."""
    name = 'tensorrt' if compiler == 'tensorrt' else 'tensorrt_rtx'
    if importlib.util.find_spec(name) is None:
        package = name.replace('_', '-')
        raise ImportError(f'the engine was built by {compiler} and needs {name} to run: pip install {package}')
    return importlib.import_module(name)
