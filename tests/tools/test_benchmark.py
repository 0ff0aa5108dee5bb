"""The benchmarks run from the command line and print both sides. Without these tests they rot unseen: no figure of
theirs is asserted anywhere, since a timed test would fail on a busy machine."""

import json

import pytest
import torch

from densezoo.backbones import create_model
from densezoo.tools.benchmark import main, parser
from densezoo.tools.benchmarks import kernels, latency, reduction, window
from densezoo.tools.benchmarks.timing import Comparison, compare

TINY = ['--model', 'deit_tiny_patch16_224']
SMALL = {'depths': (1, 1, 1, 1), 'dims': (8, 16, 24, 32)}


def test_compare_takes_the_minimum_of_each_side_in_turn():
    calls = []
    row = compare('x', lambda: calls.append('a'), lambda: calls.append('b'), peer_name='b', repeats=2, warmup=1)
    assert calls == ['a', 'b', 'a', 'b', 'b', 'a']
    assert row.ours > 0 and row.peer > 0
    assert Comparison('x', ours=2.0, peer=3.0, peer_name='b').row()['ratio'] == 1.5


@pytest.mark.parametrize(
    ('what', 'options', 'peer'),
    [
        ('backbones', ['--models', 'poolformer_s12', '--batch', '1', '--size', '64', '--repeats', '1'], 'timm'),
        ('window', ['--batch', '1', '--size', '64', '72', '--stages', '2', '3', '--repeats', '1'], 'timm'),
        ('loop', ['--iterations', '20'], 'bare loop'),
        ('reduction', [*TINY, '--methods', 'tome', '--batch', '1', '--repeats', '1'], None),
        ('pipeline', ['--workers', '0', '--batches', '2'], 'torchvision reference'),
        ('pipeline', ['--workers', '0', '--batches', '2', '--masks'], 'torchvision reference'),
    ],
)
def test_speed_benchmarks_print_both_sides(capsys, what, options, peer):
    assert main(['--json', what, *options]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed[printed.index('[\n') :])
    assert rows and all(row['ours'] > 0 and row['peer'] > 0 and peer in (None, row['peer_name']) for row in rows)


def test_latency_of_every_runtime(capsys, monkeypatch):
    """Those that are there are measured; the others say why not."""
    monkeypatch.setattr(latency.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(latency.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(latency, 'create_model', lambda name, **options: create_model(name, **SMALL, **options))
    runtimes = ['eager', 'onnxruntime', 'openvino', 'tensorrt']  # torch.compile takes a minute
    options = ['latency', 'poolformer_s12', '--size', '64', '--batch', '2', '--repeats', '5', '--runtimes', *runtimes]
    monkeypatch.setattr('densezoo.deploy.onnx.require', lambda *modules: None)
    monkeypatch.setattr('densezoo.deploy.parity.require', lambda *modules: None)
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    for line, name in zip(lines[:2], runtimes, strict=False):
        middle, p90, p99, rate = (float(cell) for cell in line.split('|')[2:-1])
        assert line.startswith(f'| {name} |') and 0 < middle <= p90 <= p99
        assert rate == pytest.approx(2000 / middle, rel=0.1)
    assert "not measured: OpenVINO is not installed: pip install 'densezoo[openvino]'" in lines[2]
    assert 'not measured: TensorRT needs a CUDA GPU, and torch finds none' in lines[3]
    assert main(['latency', 'poolformer_s12', '--runtimes', 'tflite']) == 1
    assert 'runtimes must be of eager, compile, onnxruntime, openvino, tensorrt, got tflite' in capsys.readouterr().err


@pytest.mark.parametrize('shift', [0, 3])
def test_both_sides_of_the_window_benchmark_compute_the_same(shift):
    ours, peer = window.pair(64, (14, 21), shift)
    x = torch.randn(2, 14, 21, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer._attn(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_kernels_are_compared_with_peers_that_compute_the_same(capsys, dtype):
    command = ['kernels', '--batch', '2', '--sizes', '64', '--repeats', '2', '--dtype', dtype]
    assert main([*command, '--train'] if dtype == 'float32' else command) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert 'of copy bandwidth' in lines[0] and '(CPU)' in lines[0]
    for operation in (*kernels.OPERATIONS, 'window 2x16x16x96', 'sparse windows', 'blocks of 64', 'conv, GELU'):
        assert any(line.startswith(f'| {operation}') for line in lines), operation
    assert any('forward and backward' in line for line in lines) == (dtype == 'float32')


def test_each_operation_can_be_asked_for():
    options = parser().parse_args(['kernels', '--operations', *kernels.OPERATIONS])
    assert tuple(options.operations) == kernels.OPERATIONS == tuple(kernels.CASES)


def test_a_peer_that_computes_something_else_is_refused():
    case = next(kernels.window_cases('cpu', torch.float32, 1, (32,), 96))
    with pytest.raises(RuntimeError, match=r'twice computes something else, relative deviation 0\.5'):
        kernels.check(case, 'twice', lambda qkv, bias: 2 * kernels.rolled(qkv, bias))


def test_tome_is_compared_with_the_authors_patch(tmp_path):
    """A stand-in for their checkout: without one there is nothing to compare with, and a patch that computes something
    else is refused."""
    with pytest.raises(
        FileNotFoundError, match=r'--authors needs a checkout of https://github.com/facebookresearch/ToMe'
    ):
        reduction.patch(str(tmp_path), torch.nn.Identity())
    place = tmp_path / 'tome' / 'patch'
    place.mkdir(parents=True)
    (place / 'timm.py').write_text('def apply_patch(model):\n    pass\n')
    with pytest.raises(RuntimeError, match=r"the authors' patch computes something else, deviation"):
        reduction.against_authors(str(tmp_path), 'vit_tiny_patch16_224', torch.randn(1, 3, 224, 224), 1)


def test_peak_counts_what_is_held_at_once():
    def call():
        for _ in range(3):
            torch.empty(1000).add_(torch.empty(1000))

    assert 8000 <= window.peak(call) < 12000


@pytest.mark.parametrize('task', ['classification', pytest.param('detection', marks=pytest.mark.slow)])
def test_peers_train_the_same_head_on_another_backbone(capsys, tmp_path, task):
    assert main(['peers', '--tasks', task, '--max-iters', '2', '--work-dir', str(tmp_path)]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith(f'| {task} |') and 'mobilenet_v3_small' in line
    assert (tmp_path / f'{task}_peer' / 'metrics.json').is_file()


def test_flash_window_attention_is_a_peer_out_of_a_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match='flash_window must be a checkout that holds flash_swin_attn'):
        kernels.run(operations=['window'], flash_window=str(tmp_path))
    package = tmp_path / 'flash_swin_attn'
    package.mkdir()
    package.joinpath('__init__.py').write_text(
        'import torch\n\n\ndef flash_swin_attn_func(q, k, v, bias, scale):\n'
        '    return torch.softmax(scale * q @ k.mT + bias, -1) @ v\n'
    )
    rows = kernels.run(operations=['window'], sizes=(56,), batch=1, repeats=1, flash_window=str(tmp_path))
    names = [row.name for row in rows if row.peer_name == 'Flash Window Attention']
    assert names == ['window, no shift, 1x14x14x96 forward', 'window, no shift, 1x7x7x192 forward']
