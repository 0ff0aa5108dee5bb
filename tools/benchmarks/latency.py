"""Latency and throughput of one model on every runtime there is: eager, torch.compile, onnxruntime, OpenVINO, TensorRT.

All on the same images, in turn round by round, so that what disturbs the machine disturbs all alike. A runtime that is
not installed, or needs a card that is not there, gets a line that says so.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from densezoo.backbones import create_model
from densezoo.deploy import Engine, OnnxModel, build_engine, export_onnx, fuse_for_deploy

RUNTIMES = ('eager', 'compile', 'onnxruntime', 'openvino', 'tensorrt')


@dataclass(frozen=True)
class Latency:
    """One line: seconds per call of the whole batch, images per second at the median, or why there is no figure."""

    runtime: str
    median: float | None = None
    p90: float | None = None
    p99: float | None = None
    images_per_second: float | None = None
    not_measured: str | None = None

    def row(self) -> dict[str, Any]:
        return asdict(self)


def run(
    model: str,
    *,
    features: bool = False,
    batch: int = 1,
    size: int = 224,
    repeats: int = 100,
    device: str = 'cpu',
    runtimes: Sequence[str] = RUNTIMES,
) -> list[Latency]:
    """One line per runtime.

    Args:
        model: name of a backbone; or FILE.onnx, which the runtimes of PyTorch cannot run.
        features: the pyramid instead of the classifier.
        batch, size: of the images.
        repeats: calls of each runtime that count.
        device: 'cpu', or 'cuda' for the runtimes that know it; TensorRT needs it.
    """
    unknown = set(runtimes) - set(RUNTIMES)
    if unknown:
        raise ValueError(f'runtimes must be of {", ".join(RUNTIMES)}, got {", ".join(sorted(unknown))}')
    if batch < 1 or size < 1 or repeats < 2:
        raise ValueError(f'batch and size must be positive, repeats at least 2, got {batch=}, {size=}, {repeats=}')
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        network, file, images = _prepare(model, features, batch, size, Path(scratch))
        calls: dict[str, Callable[[], object]] = {}
        reasons: dict[str, str] = {}
        for runtime in runtimes:
            try:
                calls[runtime] = _call(runtime, network, file, images, device)
                calls[runtime]()  # the first call compiles and allocates
                calls[runtime]()
            except (ImportError, RuntimeError, ValueError) as error:
                calls.pop(runtime, None)
                reasons[runtime] = ' '.join(str(error).split())
        times: dict[str, list[float]] = {name: [] for name in calls}
        for name in _rounds(list(calls), repeats):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return [
        Latency(runtime, not_measured=reasons[runtime]) if runtime in reasons else _line(runtime, times[runtime], batch)
        for runtime in runtimes
    ]


def _prepare(model: str, features: bool, batch: int, size: int, folder: Path) -> tuple[Any, Path, Tensor]:
    if model.endswith('.onnx'):
        smallest, largest = OnnxModel(model).shapes
        shape = [b or a or wanted for a, b, wanted in zip(smallest, largest, (batch, 3, size, size))]
        shape[0] = largest[0] or batch
        return None, Path(model), torch.rand(shape)
    network = fuse_for_deploy(create_model(model, features_only=features).eval())
    images = torch.rand(batch, 3, size, size)
    return network, export_onnx(network, images, folder / 'model.onnx', dynamic_batch=False), images


def _call(runtime: str, network: Any, file: Path, images: Tensor, device: str) -> Callable[[], object]:
    """What runs the model once and waits for it, outputs on the device."""
    if runtime in ('eager', 'compile'):
        if network is None:
            raise ValueError('an ONNX file holds no PyTorch module')
        module = network.to(device=device, memory_format=torch.channels_last)
        x = images.to(device).contiguous(memory_format=torch.channels_last)
        if runtime == 'compile':
            module = torch.compile(module, fullgraph=True)
        wait = torch.cuda.synchronize if device != 'cpu' else lambda: None
        return lambda: _after(module(x), wait)
    if runtime == 'onnxruntime':
        providers = ['CUDAExecutionProvider'] if device != 'cpu' else None
        session = OnnxModel(file, providers=providers).session
        if providers and providers[0] not in session.get_providers():
            raise RuntimeError('this onnxruntime has no CUDA: pip install onnxruntime-gpu')
        feed = {session.get_inputs()[0].name: images.numpy()}
        return lambda: session.run(None, feed)
    if runtime == 'openvino':
        return _openvino(file, images)
    if not torch.cuda.is_available():
        raise RuntimeError('TensorRT needs a CUDA GPU, and torch finds none')
    path = file.with_suffix('.engine') if network is not None else Path(tempfile.mkdtemp()) / 'model.engine'
    build_engine(file, path, batch=(len(images),) * 3)
    engine, x = Engine(path), images.cuda()
    return lambda: _after(engine(x), torch.cuda.synchronize)


def _openvino(file: Path, images: Tensor) -> Callable[[], object]:
    if importlib.util.find_spec('openvino') is None:
        raise ImportError("OpenVINO is not installed: pip install 'densezoo[openvino]'")
    import openvino

    settings = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'PERFORMANCE_HINT': 'LATENCY'}
    compiled = openvino.Core().compile_model(str(file), 'CPU', settings)
    request, array = compiled.create_infer_request(), images.numpy()
    return lambda: request.infer([array])


def _after(outputs: object, wait: Callable[[], None]) -> object:
    wait()
    return outputs


def _rounds(names: list[str], repeats: int) -> Iterator[str]:
    for i in range(repeats):
        yield from names if i % 2 == 0 else reversed(names)  # who runs first finds colder caches


def _line(runtime: str, times: list[float], batch: int) -> Latency:
    cuts = quantiles(times, n=100, method='inclusive')
    middle = median(times)
    return Latency(runtime, middle, cuts[89], cuts[98], batch / middle)
