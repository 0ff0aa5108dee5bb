"""Without this a graph could be written that NVIDIA's compiler refuses. Engines are built for real, without a GPU, by
the ahead-of-time compiler of TensorRT for RTX."""

import json

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from densezoo.deploy import Engine, Half, build_engine, engine, export_onnx, quantize, tensorrt


def test_engine_with_dynamic_batch(tiny_onnx, tmp_path):
    report = build_engine(tiny_onnx, tmp_path / 'tiny.engine', batch=(1, 4, 8))
    assert report['profiles'] == {'images': [[n, 3, 64, 64] for n in (1, 4, 8)]}
    assert report['bytes'] == (tmp_path / 'tiny.engine').stat().st_size > 50_000 and report['layers'] > 20
    assert report['precision'] == 'fp32' and report['metadata']['architecture'] == 'caformer_s18'
    assert json.loads((tmp_path / 'tiny.engine.json').read_text()) == report
    assert sorted(file.name for file in tmp_path.iterdir()) == ['tiny.engine', 'tiny.engine.json']


@pytest.mark.parametrize('precision', ['fp16', 'bf16', 'int8'])
def test_engines_in_low_precision(tiny, tiny_onnx, tmp_path, precision):
    model, images = tiny
    path = tmp_path / 'low.onnx'
    if precision == 'int8':
        quantize(tiny_onnx, path, [images])
    else:
        export_onnx(Half(model, precision), images, path, metadata={'precision': precision})
    report = build_engine(path, tmp_path / 'low.engine')
    assert report['precision'] == precision and report['outputs'][0]['dtype'] == 'float'


def test_refusals_are_one_line_and_leave_no_file(tmp_path):
    graph = helper.make_graph(
        [helper.make_node('Det', ['x'], ['z'])],
        'g',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info('z', TensorProto.FLOAT, [])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)]), tmp_path / 'det.onnx')
    with pytest.raises(RuntimeError, match=r'^det\.onnx: TensorRT cannot read the graph: .*Det') as caught:
        build_engine(tmp_path / 'det.onnx', tmp_path / 'det.engine')
    assert '\n' not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ['det.onnx']


def test_bad_orders(tiny_onnx, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r'batch must be smallest <= usual <= largest, .* got batch=\(4, 1, 8\)'):
        build_engine(tiny_onnx, tmp_path / 'x.engine', batch=(4, 1, 8))
    with pytest.raises(FileNotFoundError, match='no such ONNX file'):
        build_engine(tmp_path / 'none.onnx', tmp_path / 'x.engine')
    with pytest.raises(FileNotFoundError, match='no such folder'):
        build_engine(tiny_onnx, tmp_path / 'none' / 'x.engine')
    with pytest.raises(ValueError, match=r"compiler must be one of tensorrt, .* got 'trt'"):
        build_engine(tiny_onnx, tmp_path / 'x.engine', compiler='trt')
    monkeypatch.setattr(tensorrt.importlib.util, 'find_spec', lambda name: None)
    tensorrt._ahead_of_time.cache_clear()
    with pytest.raises(ImportError, match=r"TensorRT is not installed: pip install tensorrt; .*'densezoo\[engine\]'"):
        build_engine(tiny_onnx, tmp_path / 'x.engine')
    tensorrt._ahead_of_time.cache_clear()
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_dies_is_reported(tiny_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, '_WORKER', tmp_path / 'dies.py')
    (tmp_path / 'dies.py').write_text('import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
    with pytest.raises(RuntimeError, match=r'tensorrt_rtx_ahead_of_time ended with status -9: it said nothing'):
        build_engine(tiny_onnx, tmp_path / 'x.engine')
    assert [file.name for file in tmp_path.iterdir()] == ['dies.py']


REPORT = {
    'compiler': 'tensorrt',
    'version': '10.9.0',
    'inputs': [{'name': 'images', 'shape': [-1, 3, 64, 64], 'dtype': 'float'}],
    'outputs': [{'name': 'logits', 'shape': [-1, 7], 'dtype': 'float'}],
    'profiles': {'images': [[1, 3, 64, 64], [4, 3, 64, 64], [8, 3, 64, 64]]},
}


class OnGpu:
    """Stands for a CUDA tensor where there is no GPU: what the checks look at."""

    def __init__(self, *shape, dtype=torch.float32):
        self.shape, self.dtype, self.device = shape, dtype, torch.device('cuda')


def test_inputs_are_checked_against_the_profile():
    dtypes = {'images': torch.float32}
    engine.check_inputs(REPORT, dtypes, [OnGpu(8, 3, 64, 64)])
    for tensor, text in (
        (OnGpu(9, 3, 64, 64), r'images must be from \(1, 3, 64, 64\) to \(8, 3, 64, 64\), got \(9, 3, 64, 64\)'),
        (OnGpu(8, 3, 32, 64), r'got \(8, 3, 32, 64\)'),
        (OnGpu(8, 3, 64, 64, dtype=torch.float16), 'images must be a CUDA tensor of torch.float32, got torch.float16'),
        (torch.zeros(8, 3, 64, 64), 'got torch.float32 on cpu'),
    ):
        with pytest.raises(ValueError, match=text):
            engine.check_inputs(REPORT, dtypes, [tensor])
    with pytest.raises(ValueError, match=r"the engine takes \['images'\], got 0 tensors"):
        engine.check_inputs(REPORT, dtypes, [])


def test_engines_that_cannot_run_say_why(tmp_path, monkeypatch):
    path = tmp_path / 'm.engine'
    with pytest.raises(FileNotFoundError, match=r'no such file: .*m\.engine; `densezoo export'):
        Engine(path)
    path.write_bytes(b'')
    with pytest.raises(FileNotFoundError, match=r'no such file: .*m\.engine\.json'):
        Engine(path)
    (tmp_path / 'm.engine.json').write_text(json.dumps(REPORT))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(RuntimeError, match='needs a CUDA GPU, and torch finds none'):
        Engine(path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(engine.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match='built by tensorrt and needs tensorrt to run: pip install tensorrt'):
        Engine(path)


def test_another_version_is_named():
    loaded = Engine.__new__(Engine)
    loaded.report = REPORT
    with pytest.raises(RuntimeError, match=r'built by tensorrt 10\.9\.0, here is 10\.11\.0; build it again here'):
        loaded._check_version('10.11.0')
    loaded._check_version('10.9.3')
