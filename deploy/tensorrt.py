"""ONNX files into TensorRT engines, by whichever of NVIDIA's compilers is installed.

`tensorrt` (Jetson, datacentre; 10 and 11), `tensorrt_rtx`, or, on a machine without a GPU, the ahead-of-time compiler
of TensorRT for RTX that lies inside onnxruntime's plugin wheel. Networks are strongly typed: precision is what the
graph says. Beside FILE.engine lies FILE.engine.json: compiler, version, profile, tensors, metadata, warnings.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .onnx import read_metadata, replacing, require

INSTALL = 'pip install tensorrt'
INSTALL_AHEAD = "pip install 'densezoo[engine]'"
_WORKER = Path(__file__).with_name('trt_worker.py')

# smallest, usual and largest shape of an input
Profile = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Compiler:
    """A compiler on this machine: its name, its Python module, and the environment its process needs."""

    name: str
    module: str
    environment: Mapping[str, str] = field(default_factory=dict)


def find_compiler(name: str | None = None) -> Compiler:
    """The compiler called `name` ('tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_ahead_of_time'), or the first one there is.

    Raises:
        ImportError: there is none; the message says what to install.
    """
    known = ('tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_ahead_of_time')
    if name is not None and name not in known:
        raise ValueError(f'compiler must be one of {", ".join(known)}, got {name!r}')
    for candidate in known[:2]:
        if name in (None, candidate) and importlib.util.find_spec(candidate) is not None:
            return Compiler(candidate, candidate)
    if name in (None, known[2]):
        environment = _ahead_of_time()
        if environment is not None:
            return Compiler(known[2], 'tensorrt_bindings', environment)
    raise ImportError(
        f'{name or "TensorRT"} is not installed: {INSTALL}; to build on a machine without a GPU: {INSTALL_AHEAD}'
    )


def build_engine(
    onnx_file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    batch: tuple[int, int, int] = (1, 4, 8),
    size: tuple[int, int, int] | None = None,
    profiles: Mapping[str, Profile] | None = None,
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    compiler: str | None = None,
) -> dict[str, Any]:
    """Compiles an ONNX file.

    Args:
        onnx_file: from `export_onnx`; the precision of its graph is that of the engine.
        path: of the engine; FILE.json is written beside it.
        batch: smallest, usual and largest batch, for inputs whose batch is dynamic.
        size: smallest, usual and largest height and width, for inputs of dynamic size; the file's own range and 512
            if None.
        profiles: shapes by input, instead of what batch and size give.
        workspace: bytes that the compiler's layers may use; the compiler's own limit if None.
        timing_cache: file of measured kernels, read and extended: later builds are faster.
        compiler: see `find_compiler`.

    Returns:
        What the JSON file holds.

    Raises:
        ImportError: no compiler.  FileNotFoundError: no such file or folder.
        ValueError: a profile does not fit the inputs.  RuntimeError: the compiler refuses; the message is its reason.
    """
    found = find_compiler(compiler)
    source = Path(onnx_file)
    if not source.is_file():
        raise FileNotFoundError(f'no such ONNX file: {source}')
    metadata = read_metadata(source)
    shapes = dict(profiles) if profiles is not None else _profiles(source, batch, size or _range(metadata))
    with replacing(path) as unfinished:
        order = {
            'module': found.module,
            'onnx': str(source.resolve()),
            'engine': str(unfinished.resolve()),
            'profiles': {name: [list(shape) for shape in profile] for name, profile in shapes.items()},
            'workspace': workspace,
            'cache': None if timing_cache is None else os.fspath(timing_cache),
        }
        answer = _run(found, order)
        if 'error' in answer:
            raise RuntimeError(f'{source.name}: {answer["error"]}')
        report = {
            'compiler': found.name,
            'version': answer['version'],
            'precision': metadata.get('precision', 'fp32'),
            'profiles': order['profiles'],
            **{key: answer[key] for key in ('bytes', 'layers', 'inputs', 'outputs', 'warnings')},
            'metadata': metadata,
        }
        with replacing(f'{os.fspath(path)}.json') as description:
            description.write_text(json.dumps(report, indent=2) + '\n')
    return report


def _run(compiler: Compiler, order: dict[str, Any]) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, str(_WORKER)],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        env={**os.environ, **compiler.environment},
        check=False,
    )
    lines = process.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        told = ' '.join(process.stderr.split())[-300:] or 'it said nothing'
        return {'error': f'{compiler.name} ended with status {process.returncode}: {told}'}


def _profiles(
    source: Path, batch: tuple[int, int, int], size: tuple[int, int, int]
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Shapes of every input with a dynamic dimension: the first is the batch, the third and fourth are the size."""
    require('onnx')
    import onnx

    for name, values in (('batch', batch), ('size', size)):
        if len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
            raise ValueError(f'{name} must be smallest <= usual <= largest, all positive, got {name}={tuple(values)}')
    shapes = {}
    for entry in onnx.load(str(source), load_external_data=False).graph.input:
        dims = [d.dim_value if d.HasField('dim_value') else None for d in entry.type.tensor_type.shape.dim]
        if None in dims:
            ranges = [batch, None, size, size][: len(dims)]
            if any(d is None and r is None for d, r in zip(dims, [*ranges, *[None] * len(dims)])):
                raise ValueError(f'input {entry.name} varies in other dimensions than batch and size: pass profiles=')
            shapes[entry.name] = tuple(
                [d if d is not None else ranges[i][k] for i, d in enumerate(dims)]  # type: ignore[index]
                for k in range(3)
            )
    return shapes  # type: ignore[return-value]


def _range(metadata: Mapping[str, Any]) -> tuple[int, int, int]:
    smallest, largest = metadata.get('size_range') or (256, 1024)
    return smallest, min(max(512, smallest), largest), largest


@functools.cache
def _ahead_of_time() -> dict[str, str] | None:
    """Environment under which `tensorrt_bindings` finds the ahead-of-time compiler, if both wheels are there.

    The bindings ask for libraries under the names of the large TensorRT; links with these names lead to the compiler,
    and a library of one line stands for the plugins, which it has none of.
    """
    plugin = importlib.util.find_spec('onnxruntime_ep_nv_tensorrt_rtx')
    if importlib.util.find_spec('tensorrt_bindings') is None or plugin is None:
        return None
    folder = Path(next(iter(plugin.submodule_search_locations or [])))
    libraries = [sorted(folder.glob(f'{name}.so.*.*')) for name in ('libtensorrt_rtx', 'libtensorrt_onnxparser_rtx')]
    tool = shutil.which('cc') or shutil.which('gcc')
    if not all(libraries) or tool is None:
        return None
    library, parser = (found[0] for found in libraries)
    major = _major_version()
    links = Path(tempfile.mkdtemp(prefix='densezoo-tensorrt-'))
    for name, target in (
        (f'libnvinfer.so.{major}', library),
        (library.name.split('.so.')[0] + '.so.' + library.name.split('.so.')[1].split('.')[0], library),
        (f'libnvonnxparser.so.{major}', parser),
    ):
        (links / name).symlink_to(target)
    source = links / 'plugins.c'
    source.write_text('int initLibNvInferPlugins(void *logger, const char *name) { return 1; }\n')
    subprocess.run(
        [tool, '-shared', '-fPIC', '-o', str(links / f'libnvinfer_plugin.so.{major}'), str(source)], check=True
    )
    before = os.environ.get('LD_LIBRARY_PATH')
    return {'LD_LIBRARY_PATH': f'{links}:{before}' if before else str(links)}


def _major_version() -> str:
    from importlib import metadata

    for name in ('tensorrt-cu13-bindings', 'tensorrt-cu12-bindings', 'tensorrt_bindings'):
        try:
            return metadata.version(name).split('.')[0]
        except metadata.PackageNotFoundError:
            continue
    return '11'
