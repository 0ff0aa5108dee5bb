"""What a user types to deploy: from a run to ONNX, int8, an engine and a program, and one line for each mistake."""

import contextlib
import json
import re
import resource
from pathlib import Path

import pytest
import torch

from densezoo.deploy import OnnxModel, build_engine, read_metadata, tensorrt
from densezoo.tools import cli
from densezoo.tools import export as export_tool
from densezoo.tools import train as train_tool


@pytest.fixture(scope='module')
def run(tmp_path_factory, pictures):
    import tiny_run

    folder = tmp_path_factory.mktemp('trained')
    config = tiny_run.write_config(folder, pictures)
    assert (
        train_tool.main([str(config), '--work-dir', str(folder / 'run'), '--cfg-options', 'train_cfg.max_iters=2']) == 0
    )
    return folder / 'run'


def export(run, *options):
    return cli.main(['export', str(run / 'config.py'), str(run / 'last.pth'), *options])


def test_onnx_of_a_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export(run) == 0
    printed = capsys.readouterr().out
    assert '| logits | 2x4 |' in printed and 'written: config_fp32.onnx' in printed
    found = read_metadata('config_fp32.onnx')
    assert found['classes'] == ['cyan', 'green', 'magenta', 'red'] and found['range'] == '0..255'
    assert OnnxModel('config_fp32.onnx')(torch.rand(3, 3, 32, 32) * 255).shape == (
        3,
        4,
    )  # the validation pictures' size


def test_int8_engine(run, pictures, tmp_path, capsys):
    out = tmp_path / 'tiny.engine'
    options = [
        '--format',
        'engine',
        '--precision',
        'int8',
        '--calibrate',
        str(pictures / 'val'),
        '--batch',
        '1',
        '2',
        '4',
    ]
    assert export(run, *options, '--out', str(out)) == 0
    report = json.loads(Path(f'{out}.json').read_text())
    assert report['precision'] == 'int8' and report['profiles']['images'][2] == [4, 3, 32, 32]
    assert report['metadata']['task'] == 'ImageClassifier'
    assert sorted(file.name for file in tmp_path.iterdir()) == ['tiny.engine', 'tiny.engine.json', 'tiny.onnx']
    assert f'written: {out}' in capsys.readouterr().out


def test_program_of_a_backbone(tmp_path):
    out = tmp_path / 'backbone.pt2'
    options = [
        '--model',
        'identityformer_s12',
        '--features',
        '--format',
        'program',
        '--dynamic-size',
        '--size',
        '64',
        '64',
    ]
    assert cli.main(['export', *options, '--out', str(out)]) == 0
    maps = torch.export.load(out).module()(torch.randn(3, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.fixture(scope='module')
def file(run, tmp_path_factory):
    """The run as ONNX, for batches of any size."""
    path = tmp_path_factory.mktemp('exported') / 'tiny.onnx'
    assert export(run, '--out', str(path)) == 0
    return path


def test_a_file_takes_the_checkpoint_s_place(run, file, pictures, tmp_path, capsys):
    config = str(run / 'config.py')
    answers = []
    for checkpoint in (file, run / 'last.pth'):
        out = tmp_path / checkpoint.suffix[1:]
        assert cli.main(['predict', config, str(checkpoint), str(pictures / 'val'), '--out', str(out)]) == 0
        answers.append(json.loads((out / 'predictions.json').read_text()))
        assert len(list(out.glob('*.png'))) == len(answers[-1]) == 12
    for ours, theirs in zip(*answers, strict=True):
        assert ours['name'] == theirs['name'] and ours['scores'] == pytest.approx(theirs['scores'], abs=1e-4)
        assert {k: ours[k] for k in ('file', 'size')} == {k: theirs[k] for k in ('file', 'size')}
    metrics = []
    for checkpoint in (file, run / 'last.pth'):
        options = ['--out', str(tmp_path / 'm.json'), '--work-dir', str(tmp_path / 'test')]
        assert cli.main(['test', config, str(checkpoint), *options[: 2 if checkpoint is file else 4]]) == 0
        metrics.append(json.loads((tmp_path / 'm.json').read_text()))
    assert metrics[0] == pytest.approx({key: metrics[1][key] for key in metrics[0]})
    assert 'accuracy/top1' in metrics[0] and 'accuracy/top1' in capsys.readouterr().out


def test_int8_within_a_budget(run, pictures, tmp_path, capsys):
    options = ['--precision', 'int8', '--calibrate', str(pictures / 'val'), '--budget', '50', '--evaluate']
    assert export(run, *options, '--ranges', 'percentile', '--out', str(tmp_path / 'x.onnx')) == 0
    printed = capsys.readouterr().out
    assert (
        'accuracy/top1' in printed
        and 'every layer is in int8' in printed
        and '| metric | x.onnx | PyTorch |' in printed
    )
    assert [path.name for path in tmp_path.iterdir()] == ['x.onnx']


def test_operators_are_counted(run, tmp_path, capsys):
    assert export(run, '--static-batch', '1', '--out', str(tmp_path / 'x.onnx')) == 0
    assert re.search(r'\d+ operators, of them 0 Cast, \d+ Transpose, \d+ Reshape', capsys.readouterr().out)


def test_inputs_outside_the_range_are_one_line(run, file, pictures, tmp_path, capsys):
    model = OnnxModel(file)
    with pytest.raises(ValueError, match=r"takes images from \('any', 3, 32, 32\) to .*, got \(1, 3, 32, 16\)"):
        model(torch.rand(1, 3, 32, 16))
    fixed = tmp_path / 'two.onnx'
    assert export(run, '--static-batch', '2', '--dynamic-size', '--size', '64', '64', '--out', str(fixed)) == 0
    model = OnnxModel(fixed)
    assert model(torch.rand(2, 3, 33, 50)).shape == (2, 4)
    for shape in ((3, 3, 64, 64), (2, 3, 32, 64)):
        with pytest.raises(ValueError, match=r'two\.onnx takes images from \(2, 3, 33, 33\) to .*, got'):
            model(torch.rand(shape))


@contextlib.contextmanager
def small_disk(size):
    """Files cannot grow beyond `size` bytes: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('format', ['onnx', 'engine', 'program'])
def test_a_full_disk_leaves_no_half_file(run, file, format, tmp_path, capsys):
    out = tmp_path / f'x.{format}'
    out.write_text('old')
    if format == 'engine':
        with small_disk(20_000), pytest.raises(RuntimeError, match=r'tiny\.onnx: OSError: .*File too large'):
            build_engine(file, out)
    else:
        with small_disk(2_000):
            assert export(run, '--format', format, '--out', str(out)) == 1
        error = capsys.readouterr().err
        assert 'error: ' in error and 'File too large' in error
    assert out.read_text() == 'old' and list(tmp_path.iterdir()) == [out]


def test_missing_tools_are_one_line(run, pictures, tmp_path, monkeypatch, capsys):
    assert export(run, '--precision', 'fp16', '--autocast', '--out', str(tmp_path / 'x.onnx')) == 1
    assert "AutoCast needs NVIDIA ModelOpt, which is not installed: pip install 'nvidia-modelopt[onnx]'" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(tensorrt, 'find_compiler', lambda name=None: tensorrt.Compiler('tensorrt', 'no_such_module'))
    assert export(run, '--format', 'engine', '--out', str(tmp_path / 'x.engine')) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: x.onnx: ModuleNotFoundError: ') and not (tmp_path / 'x.engine').exists()


@pytest.mark.slow
def test_aoti_of_a_backbone(tmp_path):
    out = tmp_path / 'tiny.pt2'
    options = ['--model', 'poolformer_s12', '--features', '--format', 'aoti', '--size', '64', '64']
    assert cli.main(['export', *options, '--out', str(out)]) == 0
    maps = torch._inductor.aoti_load_package(str(out))(torch.randn(3, 3, 64, 64))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ([], 'pass CONFIG and CHECKPOINT, or --model NAME'),
        (['--model', 'poolformer_s13'], "no model is called 'poolformer_s13'; did you mean poolformer_s12?"),
        (['--model', 'poolformer_s12', '--precision', 'int8'], '--precision int8 needs --calibrate FOLDER'),
        (['--model', 'poolformer_s12', '--calibrate', 'none'], "no image 'none'"),
        (
            ['--model', 'poolformer_s12', '--calibrate', '.'],
            "no image '.': neither a file, nor a folder or pattern with",
        ),
        (['--model', 'poolformer_s12', '--budget', '1'], '--budget is for --precision int8 of a CONFIG'),
        (['--model', 'poolformer_s12', '--evaluate'], '--evaluate is for --format onnx or engine of a CONFIG'),
        (['--model', 'poolformer_s12', '--autocast'], '--autocast is for --precision fp16 or bf16'),
        (['--model', 'poolformer_s12', '--static-batch', '0'], '--static-batch must be at least 1, got 0'),
        (['--model', 'poolformer_s12', '--calibration-images', '0'], '--calibration-images must be at least 1, got 0'),
        (['--model', 'poolformer_s12', '--size', '31', '64'], 'images must be at least 32 pixels high and wide'),
        (['--model', 'randformer_s12', '--features', '--dynamic-size'], 'dynamic_size needs a model of any size'),
    ],
)
def test_mistakes_are_one_line(options, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['export', *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and text in error and error.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_config(run, tmp_path, capsys):
    wrong = ['--cfg-options', 'model.backbone.dims=(8, 16, 24, 64)', '--out', str(tmp_path / 'x.onnx')]
    assert export(run, *wrong) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'last.pth does not fit the model: of another shape ' in error and not list(tmp_path.iterdir())


def test_calibration_normalises_as_the_model_does(pictures):
    """Published small-image models have other means than ImageNet's."""
    options = export_tool.parser().parse_args(['--model', 'cct_2_3x2_32', '--calibrate', str(pictures / 'val')])
    source = export_tool._backbone(options)
    batch = next(export_tool._calibration(options, source.entries, 32, 32))
    mean, std = (torch.tensor(source.model.default_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    assert mean.flatten()[0] == pytest.approx(0.4914)
    pixels = (batch * std + mean) * 255
    assert pixels.min() > -1e-3 and pixels.max() < 255.001 and pixels.std() > 1
    assert batch.shape[-2:] == (32, 32)
