"""What a user types to deploy: from a run to ONNX, int8, an engine and a program, and one line for each mistake."""

import json
from pathlib import Path

import pytest
import torch

from densezoo.deploy import OnnxModel, read_metadata
from densezoo.tools import cli
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


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ([], 'pass CONFIG and CHECKPOINT, or --model NAME'),
        (['--model', 'poolformer_s13'], "no model is called 'poolformer_s13'; did you mean poolformer_s12?"),
        (['--model', 'poolformer_s12', '--precision', 'int8'], '--precision int8 needs --calibrate FOLDER'),
        (['--model', 'poolformer_s12', '--calibrate', 'none'], "no image 'none'"),
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
    assert 'error: ' in capsys.readouterr().err and not list(tmp_path.iterdir())
