"""What a user types: train, test and predict from end to end, and one line for each mistake."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

from densezoo.tools import cli, common, predict
from densezoo.tools import test as test_tool
from densezoo.tools import train as train_tool
from densezoo.train import load_config


def test_train_test_predict(config_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = tmp_path / 'run'
    options = ['--cfg-options', 'default_hooks.summary.curves=True', 'default_hooks.pictures.count=3']
    assert cli.main(['train', str(config_file), '--work-dir', str(run), '--seed', '3', '--amp', *options]) == 0
    metrics = tiny_run.read_metrics(run)
    assert set(metrics) == {'accuracy/top1', 'accuracy/top2', 'iterations', 'seconds', 'peak_memory_mib'}
    assert metrics['iterations'] == 6 and metrics['seconds'] > 0 and metrics['peak_memory_mib'] > 100
    for name in ('last.pth', 'best.pth', 'curves.png', 'train.csv', 'val.csv', 'log.jsonl', 'config.py'):
        assert (run / name).stat().st_size > 0, name
    assert len(list((run / 'predictions').glob('iter_*/sheet.png'))) == 2
    assert len(list((run / 'predictions/iter_000006').glob('*.png'))) == 4

    # The config written down with the run stands alone: it tests, predicts and trains again.
    dumped = str(run / 'config.py')
    assert load_config(dumped).randomness['seed'] == 3
    assert test_tool.main([dumped, str(run / 'last.pth'), '--out', 'metrics.json']) == 0
    tested = json.loads(Path('metrics.json').read_text())
    assert tested == {name: metrics[name] for name in tested} and tested
    assert 'accuracy/top1' in capsys.readouterr().out

    broken = tmp_path / 'broken.png'
    broken.write_bytes(next(pictures.rglob('*.png')).read_bytes()[:200])
    images = [str(pictures / 'val' / 'red'), str(pictures / 'val/cyan/*.png'), str(broken)]
    assert predict.main([dumped, str(run / 'best.pth'), *images, '--out', 'out', '--batch-size', '4']) == 1
    captured = capsys.readouterr()
    assert 'left out' in captured.err and 'broken.png' in captured.err and '6 images predicted' in captured.out
    entries = json.loads(Path('out/predictions.json').read_text())
    assert len(entries) == 6 and len(list(Path('out').glob('*.png'))) == 6
    for entry in entries:
        assert entry['name'] in tiny_run.CLASSES and entry['name'] == tiny_run.CLASSES[entry['label']]
        assert np.isclose(sum(entry['scores']), 1, atol=1e-5) and entry['score'] == max(entry['scores'])

    assert train_tool.main([dumped, '--work-dir', 'again', '--cfg-options', 'train_cfg.max_iters=1']) == 0
    assert tiny_run.read_metrics(Path('again'))['iterations'] == 1


def test_predict_shows_tokens(config_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    """Of a reduced model a sheet of panels, of another one line."""
    monkeypatch.chdir(tmp_path)
    text = config_file.read_text()
    start, end = text.index('    backbone=dict('), text.index('    head=dict(')
    text = (
        text[:start]
        + (
            "    backbone=dict(type=create_model, name='deit_tiny_patch16_224', features_only=True, out_indices=(3,),\n"
            "                  depth=3, dim=32, num_heads=2, patch_size=8, reduction=dict(type='mctf', ratio=0.3)),\n"
        )
        + text[end:]
    )
    reduced = tmp_path / 'reduced.py'
    reduced.write_text(text)
    assert train_tool.main([str(reduced), '--work-dir', 'run', '--cfg-options', 'train_cfg.max_iters=1']) == 0
    image = str(next((pictures / 'val').rglob('*.png')))
    assert predict.main(['run/config.py', 'run/last.pth', image, '--out', 'out', '--show-tokens']) == 0
    sheet = np.asarray(Image.open(next(Path('out').glob('*_tokens.png'))))
    assert sheet.shape[0] > 256 and sheet.shape[1] > 2 * 256 and sheet.std() > 1
    option = ['--cfg-options', 'model.backbone.reduction=None', '--show-tokens']
    assert predict.main(['run/config.py', 'run/last.pth', image, '--out', 'out', *option]) == 1
    assert 'the model has no reduction, got DeiT' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['CONFIG', '--cfg-options', 'train_cfg.max_iter=3'], "no key 'max_iter'; did you mean 'max_iters'"),
        (['quickstart/detecton'], "did you mean 'quickstart/detection'"),
        (['CONFIG', '--amp', 'fp16'], "use amp='bf16'"),
        (['CONFIG', '--launcher', 'pytorch'], 'needs torchrun'),
        (['CONFIG', '--cfg-options', 'model.head.num_classes=5'], 'set model.head.num_classes=4'),
        (['CONFIG', '--cfg-options', 'train_dataloader.dataset.root=/nowhere'], '/nowhere'),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR'):
        monkeypatch.delenv(name, raising=False)
    assert train_tool.main([str(config_file) if word == 'CONFIG' else word for word in argv]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith('error: ') and len(error.splitlines()) == 1


def test_a_truncated_picture_is_named_before_training(config_file: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    root = tiny_run.write_pictures(tmp_path / 'bad', train=2, val=1)
    victim = root / 'train/red/1.png'
    victim.write_bytes(victim.read_bytes()[:100])
    option = [f'train_dataloader.dataset.root={root}', 'train_cfg.max_iters=2', f'val_dataloader.dataset.root={root}']
    assert train_tool.main([str(config_file), '--cfg-options', *option]) == 1
    error = capsys.readouterr().err
    assert 'red/1.png' in error and error.count('\n') == 1
    with pytest.warns(UserWarning, match=r'1 problem.*red/1.png'):
        assert (
            train_tool.main([str(config_file), '--cfg-options', *option, 'train_dataloader.dataset.on_error=skip']) == 0
        )


def test_names_of_results_are_unique(tmp_path: Path) -> None:
    files = [tmp_path / 'a/x.png', tmp_path / 'b/x.jpg', tmp_path / 'b/y.png']
    assert list(predict.unique_names(files).values()) == ['x', 'x_2', 'y']


def test_images_are_found(tmp_path: Path) -> None:
    for name in ('b.png', 'a.JPG', 'notes.txt', 'deep/c.webp'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (4, 4)).save(tmp_path / name, 'png')
    found = predict.find_images([str(tmp_path), str(tmp_path / '*.png')])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == ['a.JPG', 'b.png', 'deep/c.webp']
    with pytest.raises(FileNotFoundError, match=r"no image 'none\*"):
        predict.find_images(['none*'])


def test_commands_without_a_module_are_not_offered(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, 'absent', 'a module that is not there')
    assert cli.main(['--help']) == 0
    shown = capsys.readouterr().out
    assert 'train' in shown and 'predict' in shown and 'absent' not in shown
    assert cli.main(['trian']) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_missing_libraries_are_explained() -> None:
    missing = ImportError('libGL.so.1: cannot open shared object file: No such file or directory')
    assert 'apt-get install libgl1 libglib2.0-0' in str(common.explain(missing))
    assert common.explain(ModuleNotFoundError("No module named 'mmengine'", name='mmengine')) == (
        'mmengine is not installed: pip install densezoo[train]'
    )
    assert common.explain(ModuleNotFoundError('x', name='skimage')) == (
        'skimage is not installed: pip install densezoo[demo]'
    )
    assert common.explain(ZeroDivisionError('ours')) is None
    with pytest.raises(json.JSONDecodeError) as caught:  # raised inside another library
        json.loads('[1')
    assert str(common.explain(caught.value)).endswith('(DENSEZOO_TRACEBACK=1 shows where)')
    with pytest.raises(ValueError, match='--batch-size') as ours:
        predict.main.__wrapped__(['config', 'checkpoint', 'image', '--batch-size', '0'])
    assert common.explain(ours.value) == '--batch-size must be at least 1, got 0'


def test_our_own_mistakes_keep_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    @common.report_errors
    def broken() -> int:
        raise ZeroDivisionError('ours')

    @common.report_errors
    def wrong() -> int:
        raise ValueError('yours')

    with pytest.raises(ZeroDivisionError):
        broken()
    assert wrong() == 1
    monkeypatch.setitem(os.environ, 'DENSEZOO_TRACEBACK', '1')
    with pytest.raises(ValueError, match='yours'):
        wrong()
