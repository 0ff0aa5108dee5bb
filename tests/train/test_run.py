"""What a run does beside training: guards, logs, averages, bars, several processes."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
import torch
from mmengine.hooks import EMAHook, Hook

from densezoo.tools import test as test_tool
from densezoo.train import build_runner, launch, load_config
from densezoo.train.checkpoint import load_checkpoint
from densezoo.train.hooks import Log, NanGuard, NonFiniteError, ProgressBar, Reseed
from densezoo.train.hooks.log import append_csv, read_log
from densezoo.train.hooks.reseed import mix


def test_a_loss_that_is_no_number_stops_the_run(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / 'run'
    build_runner(load_config(config_file, ['train_cfg.max_iters=2']), work_dir=run).train()
    good = load_checkpoint(run / 'last.pth')
    options = ['optim_wrapper.optimizer.lr=1e30', 'param_scheduler=None', 'default_hooks.checkpoint.interval=1']
    runner = build_runner(load_config(config_file, options), work_dir=run, resume_from=None)
    with pytest.raises(NonFiniteError) as caught:
        runner.train()
    message = str(caught.value)
    assert 'not finite at iteration' in message and 'the last good checkpoint stays' in message
    after = load_checkpoint(run / 'last.pth')
    assert all(bool(torch.isfinite(value).all()) for value in after['state_dict'].values() if value.is_floating_point())
    assert set(after['state_dict']) == set(good['state_dict'])


@pytest.mark.parametrize(('loss', 'norm'), [(float('nan'), 1.0), (float('inf'), 1.0), (1.0, float('nan'))])
def test_the_guard_names_iteration_terms_and_files(loss: float, norm: float) -> None:
    wrapper = SimpleNamespace(grad_norm=torch.tensor(norm), scaler=None)
    runner: Any = SimpleNamespace(iter=6, work_dir='work', optim_wrapper=wrapper)
    batch = {'images': [], 'targets': [{'file': 'a.png'}, {'file': 'b.png'}]}
    outputs = {'loss': torch.tensor(loss), 'loss_box': torch.tensor(0.25)}
    pattern = rf'iteration 7: loss={loss:.4g}, loss_box=0.25, grad_norm={norm:.4g}; files of the batch: a.png, b.png'
    with pytest.raises(NonFiniteError, match=pattern):
        NanGuard().after_train_iter(runner, 6, batch, outputs)
    NanGuard().after_train_iter(
        SimpleNamespace(iter=6, optim_wrapper=SimpleNamespace()), 6, batch, {'loss': torch.tensor(1.0)}
    )


class Spy(Hook):
    """Keeps the weights that validation saw."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seen = {name: value.clone() for name, value in runner.model.state_dict().items()}


def test_averaged_weights_are_validated_and_saved(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ['train_cfg.max_iters=4', 'train_cfg.val_interval=4'])
    config.custom_hooks = [dict(type=EMAHook, momentum=0.3)]
    runner = build_runner(config, work_dir=tmp_path / 'run')
    spy = Spy()
    runner.register_hook(spy)
    runner.train()
    saved = load_checkpoint(tmp_path / 'run/best.pth')
    trained = runner.model.state_dict()
    assert all(torch.equal(saved['state_dict'][name], value) for name, value in spy.seen.items())
    assert not torch.equal(saved['state_dict']['head.fc.weight'], trained['head.fc.weight'])
    assert torch.equal(saved['ema_state_dict']['module.head.fc.weight'], trained['head.fc.weight'])
    # Testing takes the averages, without the hook.
    assert test_tool.main([str(config_file), str(tmp_path / 'run/best.pth'), '--out', str(tmp_path / 'm.json')]) == 0
    metrics = tiny_run.read_metrics(tmp_path / 'run')
    tested = json.loads((tmp_path / 'm.json').read_text())
    assert tested and all(metrics[name] == value for name, value in tested.items())


SCRIPT = """
import sys
import torch
from torch import distributed
from densezoo.train import build_runner, launch, load_config

launch.start('pytorch')
runner = build_runner(load_config(sys.argv[1]), work_dir=sys.argv[2], launcher='pytorch')
runner.train()
state = [None, None]
distributed.all_gather_object(state, {k: v.clone() for k, v in runner.model.module.state_dict().items()})
assert all(torch.equal(state[0][k], state[1][k]) for k in state[0]), 'replicas differ'
draws = [None, None]
distributed.all_gather_object(draws, torch.rand(1).item())
assert draws[0] != draws[1], 'ranks draw the same random numbers'
if distributed.get_rank() == 0:
    print('replicas are equal, threads', torch.get_num_threads())
launch.stop()
"""


def test_two_processes_train_as_one(config_file: Path, tmp_path: Path) -> None:
    script = tmp_path / 'ranks.py'
    script.write_text(SCRIPT)
    run = tmp_path / 'run'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script)]
    done = subprocess.run(
        [*command, str(config_file), str(run)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'replicas are equal' in done.stdout
    metrics = tiny_run.read_metrics(run)
    assert set(tiny_run.read_losses(run)) == set(range(1, 7))
    # 12 validation images over two ranks in batches of 5: the metric is that of one process over the same weights.
    assert test_tool.main([str(config_file), str(run / 'last.pth'), '--out', str(tmp_path / 'm.json')]) == 0
    tested = json.loads((tmp_path / 'm.json').read_text())
    assert tested and all(metrics[name] == pytest.approx(value) for name, value in tested.items())


def test_the_bar_replaces_the_console_and_gives_it_back(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Crash(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            swapped.append([type(handler).__name__ for handler in runner.logger.handlers])
            runner.logger.warning('look here')
            raise KeyboardInterrupt

    swapped: list[list[str]] = []
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    runner = build_runner(load_config(config_file), work_dir=tmp_path / 'run')
    before = list(runner.logger.handlers)
    runner.register_hook(Crash())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert swapped == [['_AboveTheBar', 'FileHandler']]
    assert runner.logger.handlers == before
    shown = terminal.getvalue()
    assert 'train' in shown and 'look here' in shown and 'grad_norm' not in shown
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert 'look here' in log and 'grad_norm' in log


def test_no_bar_without_a_terminal(config_file: Path, tmp_path: Path) -> None:
    runner = build_runner(load_config(config_file), work_dir=tmp_path / 'run')
    bar, handlers = ProgressBar(), list(runner.logger.handlers)
    bar.before_train(runner)
    assert runner.logger.handlers == handlers and any(isinstance(h, logging.StreamHandler) for h in handlers)
    bar.close(runner)


def test_logs_average_over_the_interval(tmp_path: Path) -> None:
    group = {'lr': 0.5}
    written: list[tuple[dict[str, float], int]] = []
    hub = SimpleNamespace(update_scalar=lambda *a: None, update_info=lambda *a: None, update_info_dict=lambda *a: None)
    runner: Any = SimpleNamespace(
        iter=0, max_iters=5, max_epochs=1, work_dir=str(tmp_path), message_hub=hub,
        optim_wrapper=SimpleNamespace(param_groups=[group]), logger=logging.getLogger('quiet'),
        visualizer=SimpleNamespace(add_scalars=lambda row, step: written.append((row, step))),
    )  # fmt: skip
    log = Log(interval=2)
    log.before_train(runner)
    for iteration, loss in enumerate([1.0, 3.0, 5.0, 5.0, 9.0]):
        runner.iter = iteration
        log.before_train_iter(runner, iteration)
        log.after_train_iter(runner, iteration, None, {'loss': torch.tensor(loss)})
    rows = read_log(tmp_path / 'log.jsonl')
    assert [(row['step'], row['loss'], row['lr']) for row in rows] == [(2, 2.0, 0.5), (4, 5.0, 0.5), (5, 9.0, 0.5)]
    with open(tmp_path / 'train.csv', newline='') as file:
        assert [float(row['loss']) for row in csv.DictReader(file)] == [2.0, 5.0, 9.0]
    assert [step for _, step in written] == [2, 4, 5] and written[0][0]['train/loss'] == 2.0
    with pytest.raises(ValueError, match='interval must be at least 1'):
        Log(interval=0)


def test_a_csv_takes_new_columns(tmp_path: Path) -> None:
    path = tmp_path / 'val.csv'
    for row in ({'step': 1, 'a': 2}, {'step': 2, 'a': 3, 'b': 4}, {'step': 3, 'b': 5}):
        append_csv(path, row)
    assert path.read_text().splitlines() == ['step,a,b', '1,2,', '2,3,4', '3,,5']


def test_a_log_line_cut_short_is_left_out_and_repeats_replace(tmp_path: Path) -> None:
    path = tmp_path / 'log.jsonl'
    rows = [{'kind': 'train', 'step': 2, 'loss': 1.0}, {'kind': 'train', 'step': 1, 'loss': 3.0}]
    path.write_text('\n'.join(map(json.dumps, [*rows, {**rows[0], 'loss': 2.0}])) + '\n{"kind": "tra')
    assert [(row['step'], row['loss']) for row in read_log(path)] == [(1, 3.0), (2, 2.0)]
    assert read_log(tmp_path / 'none.jsonl') == []


def test_seeds_depend_on_run_iteration_and_rank() -> None:
    seeds = {mix(seed, iteration, rank) for seed in range(5) for iteration in range(50) for rank in range(4)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    draws = []
    for iteration in (3, 4, 3):
        Reseed().before_train_iter(SimpleNamespace(seed=1, iter=iteration), 0)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[2] != draws[1]


def test_checkpoints_fall_between_updates(config_file: Path, tmp_path: Path) -> None:
    options = ['optim_wrapper.accumulative_counts=3', 'default_hooks.checkpoint.interval=2']
    with pytest.raises(ValueError, match=r'multiple of optim_wrapper.accumulative_counts, got 2 and 3'):
        build_runner(load_config(config_file, options), work_dir=tmp_path / 'run').train()


@pytest.mark.parametrize('option', ['model.grad_checkpointing=True', "compile={'backend': 'eager'}"])
def test_switches_do_not_change_the_losses(config_file: Path, tmp_path: Path, option: str) -> None:
    for name, options in (('plain', []), ('switched', [option])):
        config = load_config(config_file, ['train_cfg.max_iters=2', *options])
        build_runner(config, work_dir=tmp_path / name).train()
    plain = tiny_run.read_losses(tmp_path / 'plain')
    assert len(plain) == 2 and tiny_run.read_losses(tmp_path / 'switched') == pytest.approx(plain, abs=1e-6)


def test_the_process_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform.startswith('linux') and os.confstr('CS_GNU_LIBC_VERSION'):
        assert launch.keep_freed_memory()
    with pytest.raises(ValueError, match="launcher must be 'none' or 'pytorch'"):
        launch.start('slurm')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1000')
    threads = torch.get_num_threads()
    try:
        launch.share_threads()
        assert torch.get_num_threads() == (threads if torch.cuda.is_available() else 1)
    finally:
        torch.set_num_threads(threads)
