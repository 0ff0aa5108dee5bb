"""Without these a misspelt key is taken in silence, or a config fails without a word."""

from pathlib import Path

import pytest
import tiny_run

from densezoo.train import find_config, load_config
from densezoo.train.config import check_style, config_names, parse_overrides


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('train_cfg.max_iter=5', r"train_cfg has no key 'max_iter'; did you mean 'max_iters'"),
        ('trian_cfg.max_iters=5', r"the config has no key 'trian_cfg'; did you mean 'train_cfg'"),
        ('model.backbone.dephts=(1,1,1,1)', r"model.backbone has no key 'dephts'; did you mean 'depths'"),
        ('model.head.num_clases=3', r"did you mean 'num_classes'"),
        ('optim_wrapper.optimizer.weight_dekay=0', r"did you mean 'weight_decay'"),
        ('optim_wrapper.clip_grad.max_nrom=1', r"did you mean 'max_norm'"),
        ('optim_wrapper.paramwise_cfg.layer_dekay=1', r"did you mean 'layer_decay'"),
        ('param_scheduler.0.ende=9', r"param_scheduler.0 has no key 'ende'; did you mean 'end'"),
        ('param_scheduler.3.end=9', r"param_scheduler is a list, its indices are 0..0, got '3'"),
        ('default_hooks.checkpont.interval=5', r"did you mean 'checkpoint'"),
        ('default_hooks.checkpoint.intervall=5', r"did you mean 'interval'"),
        ('train_dataloader.batchsize=5', r"did you mean 'batch_size'"),
        ('train_dataloader.dataset.rot=x', r"did you mean 'root'"),
        ('train_dataloader.dataset.transforms.1.brightnes=0', r"did you mean 'brightness'"),
        ('train_cfg.max_iters.much=1', r'train_cfg.max_iters is 6, nothing lies below it'),
        ('randomness.sed=1', r"did you mean 'seed'"),
        ('noequals', r'an override is KEY=VALUE'),
    ],
)
def test_a_misspelt_override_names_the_nearest_key(config_file: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(config_file, [option])


def test_overrides_reach_everything(config_file: Path) -> None:
    config = load_config(
        config_file,
        [
            'model.backbone.depths=(1,2,1,1)',
            'model.backbone.drop_path_rate=0.1',
            'model.backbone.layer_scale=1e-4',  # not in the file: an argument of the model's constructor
            'param_scheduler.0.end=9',
            'train_dataloader.dataset.transforms.1.hue=0.1',
            'default_hooks.pictures.count=2',
            'optim_wrapper.amp=bf16',
            'randomness.seed=5',
            'compile=true',
            'train_dataloader.dataset.root=~/pictures',
        ],
    )
    assert config.model.backbone.depths == (1, 2, 1, 1) and config.param_scheduler[0].end == 9
    assert config.model.backbone.layer_scale == 1e-4
    assert config.train_dataloader.dataset.transforms[1].hue == 0.1
    assert config.default_hooks.pictures.count == 2 and config.randomness.seed == 5 and config.compile is True
    assert config.train_dataloader.dataset.root == '~/pictures'


def test_values_are_python_literals_or_text() -> None:
    parsed = parse_overrides(['a=1', 'b=1e-3', 'c=(1, 2)', 'd=[a]', 'e=demo:detection', 'f=none', 'g=True', 'h=x=y'])
    expected = {'a': 1, 'b': 1e-3, 'c': (1, 2), 'd': '[a]', 'e': 'demo:detection', 'f': None, 'g': True, 'h': 'x=y'}
    assert parsed == expected


def test_a_misspelt_key_in_the_file_is_an_error_too(tmp_path: Path) -> None:
    path = tiny_run.write_config(tmp_path, tmp_path)
    path.write_text(path.read_text().replace('num_classes=4', 'num_clases=4'))
    with pytest.raises(
        ValueError, match=r"model.head.num_clases is not an argument of LinearClassifier.*'num_classes'"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('import torch, timm\n', r'bad.py, line 1: one import per line'),
        ('from torch.nn import ReLU\nmodel = ReLU()\n', r'line 2: a config describes calls.*dict\(type=ReLU, ...\)'),
        (
            'from torch.nn import ReLU\nmodel = dict(type="Task", act=ReLU)\n',
            r'line 2: ReLU may only stand under type=',
        ),
        ('model = dict(\n', r"line 1: '\(' was never closed"),
    ],
)
def test_what_lazy_configs_cannot_carry_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / 'bad.py'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_packaged_configs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = config_names()
    assert 'quickstart/detection' in names
    for name in ('quickstart/detection', 'configs/quickstart/detection.py', 'quickstart/detection.py'):
        assert find_config(name) == find_config('quickstart/detection')
    with pytest.raises(FileNotFoundError, match=r"no config 'quickstart/detektion'.*'quickstart/detection'"):
        find_config('quickstart/detektion')
    for name in names:
        check_style(find_config(name))


def test_a_variable_of_the_file_is_not_a_setting(tmp_path: Path) -> None:
    path = tiny_run.write_config(tmp_path, tmp_path)
    path.write_text('max_iters = 6\n' + path.read_text().replace('max_iters=6', 'max_iters=max_iters'))
    assert load_config(path).train_cfg.max_iters == 6
    with pytest.raises(ValueError, match=r'max_iters is a variable of the config file.*train_cfg.max_iters'):
        load_config(path, ['max_iters=9'])
