"""Builds one TensorRT engine in a process of its own: `python trt_worker.py` reads a JSON order, prints a JSON answer.

A process of its own, since a compiler bug must not take the caller down, its memory is given back at the end, and
NVIDIA's libraries are found through LD_LIBRARY_PATH, which counts only at the start of a process.

Order: {module, onnx, engine, profiles: {input: [min, opt, max]}, workspace, cache}. Answer: {ok, bytes, layers,
version, inputs, outputs, warnings} or {error}. Runs with the TensorRT bindings and the standard library alone.
"""

import importlib
import json
import os
import sys
from typing import Any


def build(order: dict[str, Any]) -> dict[str, Any]:
    trt: Any = importlib.import_module(order['module'])

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    logger = Collector()
    builder = trt.Builder(logger)
    # TensorRT 10 asks for it, 11 knows nothing else: precisions are those of the graph.
    strongly = getattr(trt.NetworkDefinitionCreationFlag, 'STRONGLY_TYPED', None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(order['onnx']):
        reasons = [_sentence(parser.get_error(i)) for i in range(parser.num_errors)]
        return {'error': 'TensorRT cannot read the graph: ' + '; '.join(dict.fromkeys(reasons))}
    config = builder.create_builder_config()
    if order.get('workspace'):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(order['workspace']))
    cache = _timing_cache(config, order.get('cache'))
    if order.get('profiles'):
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in order['profiles'].items():
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {
            'error': 'TensorRT cannot build the engine: ' + '; '.join(dict.fromkeys(logger.errors or ['no reason']))
        }
    with open(order['engine'], 'wb') as file:
        file.write(plan)
    if cache is not None and order.get('cache'):
        _write_cache(config, order['cache'])
    tensors = [
        [{'name': t.name, 'shape': list(t.shape), 'dtype': str(t.dtype).rpartition('.')[2].lower()} for t in group]
        for group in (
            [network.get_input(i) for i in range(network.num_inputs)],
            [network.get_output(i) for i in range(network.num_outputs)],
        )
    ]
    return {
        'ok': True,
        'bytes': int(plan.nbytes),
        'layers': int(network.num_layers),
        'version': str(trt.__version__),
        'inputs': tensors[0],
        'outputs': tensors[1],
        'warnings': list(dict.fromkeys(logger.warnings)),
    }


def _sentence(error: Any) -> str:
    node = f' ({error.node_operator()} {error.node_name()})'.replace(' )', ')') if hasattr(error, 'node_name') else ''
    return ' '.join(str(error.desc()).split())[:300] + node


def _timing_cache(config: Any, path: str | None) -> Any:
    if not path or not hasattr(config, 'create_timing_cache'):
        return None
    content = b''
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            content = file.read()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b'')  # of another card or version: begin a new one
        config.set_timing_cache(cache, ignore_mismatch=True)
    return cache


def _write_cache(config: Any, path: str) -> None:
    scratch = f'{path}.{os.getpid()}'
    with open(scratch, 'wb') as file:
        file.write(memoryview(config.get_timing_cache().serialize()))
    os.replace(scratch, path)


def main() -> int:
    try:
        answer = build(json.load(sys.stdin))
    except Exception as error:  # whatever it was, the caller gets one line
        answer = {'error': f'{type(error).__name__}: {" ".join(str(error).split())}'}
    print(json.dumps(answer))
    return 0 if answer.get('ok') else 1


if __name__ == '__main__':
    sys.exit(main())
