"""Without these a resumed run drifts from the uninterrupted one, or a crash costs the run."""

import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from mmengine.hooks import Hook

from densezoo.tools import train as train_tool
from densezoo.train import build_runner, load_config
from densezoo.train.checkpoint import atomic_write, load_checkpoint, plain, save_checkpoint
from densezoo.train.hooks.log import read_log


class StopAt(Hook):
    """Raise in the middle of an iteration, as a crash would."""

    priority = 'HIGHEST'

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):  # type: ignore[no-untyped-def]
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


def train(config_file: Path, work_dir: Path, *overrides: str, stop_at: int | None = None, resume: bool = False,
          epochs: bool = False) -> None:  # fmt: skip
    config = load_config(config_file, overrides)
    if epochs:
        config.train_cfg = dict(type='densezoo.train.EpochLoop', max_epochs=2, val_interval=1)
        config.default_hooks = dict(log=dict(interval=1), checkpoint=dict(interval=1, by_epoch=True), summary=None)
    runner = build_runner(config, work_dir=work_dir, resume_from=work_dir / 'last.pth' if resume else None)
    if stop_at is None:
        runner.train()
        return
    runner.register_hook(StopAt(stop_at))
    with pytest.raises(KeyboardInterrupt):
        runner.train()


@pytest.mark.parametrize('workers', [0, 2])
def test_resumed_run_repeats_uninterrupted_one(config_file: Path, tmp_path: Path, workers: int) -> None:
    ema = "custom_hooks=[{'type': 'EMAHook', 'momentum': 0.1}]"
    # The uninterrupted run loads its data in the main process, whatever the other one does.
    train(config_file, tmp_path / 'whole', ema)
    train(config_file, tmp_path / 'parts', ema, f'train_dataloader.num_workers={workers}', stop_at=3)
    assert load_checkpoint(tmp_path / 'parts/last.pth')['meta']['iter'] == 2
    train(config_file, tmp_path / 'parts', ema, f'train_dataloader.num_workers={workers}', resume=True)
    whole = tiny_run.read_losses(tmp_path / 'whole')
    assert len(whole) == 6
    assert tiny_run.read_losses(tmp_path / 'parts') == whole
    validations = [
        [row for row in read_log(tmp_path / name / 'log.jsonl') if row['kind'] == 'val'] for name in ('whole', 'parts')
    ]
    assert len(validations[0]) == 2 and validations[0] == validations[1]
    ends = [load_checkpoint(tmp_path / name / 'last.pth') for name in ('whole', 'parts')]
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][key]), key


def test_epochs_resume_exactly(config_file: Path, tmp_path: Path) -> None:
    train(config_file, tmp_path / 'whole', epochs=True)
    train(config_file, tmp_path / 'parts', epochs=True, stop_at=13)  # 10 iterations an epoch
    train(config_file, tmp_path / 'parts', epochs=True, resume=True)
    whole = tiny_run.read_losses(tmp_path / 'whole')
    assert len(whole) == 20
    assert tiny_run.read_losses(tmp_path / 'parts') == whole


def test_resuming_into_a_longer_run_is_said(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(config_file, tmp_path, 'train_cfg.max_iters=2')
    train(config_file, tmp_path, 'train_cfg.max_iters=3', resume=True)
    assert 'a run of 2 iterations, this one has 3' in capsys.readouterr().out
    best = tmp_path / 'best.pth'
    runner = build_runner(load_config(config_file), work_dir=tmp_path, resume_from=best)
    with pytest.raises(ValueError, match='holds weights only'):
        runner.train()


def test_kill_during_training_leaves_a_run_that_goes_on(config_file: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / 'run'
    command = [sys.executable, '-m', 'densezoo.tools.train', str(config_file), '--work-dir', str(work_dir)]
    options = ['default_hooks.checkpoint.interval=1', 'train_cfg.max_iters=100000', 'val_cfg=None',
               'val_dataloader=None', 'val_evaluator=None']  # fmt: skip
    process = subprocess.Popen([*command, '--cfg-options', *options], stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (work_dir / 'last.pth').exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(random.random())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = load_checkpoint(work_dir / 'last.pth')['meta']['iter']
    options[1] = f'train_cfg.max_iters={reached + 2}'
    assert train_tool.main([*command[3:], '--resume', '--cfg-options', *options]) == 0
    assert tiny_run.read_metrics(work_dir)['iterations'] == reached + 2


def save_for_ever(path: Path, first: int) -> None:
    """The work of a child process, which must never return into pytest nor outlive it for long."""
    try:
        deadline = time.monotonic() + 30
        torch.set_num_threads(1)  # the thread pool of the parent does not exist in a forked child: using it hangs
        for number in itertools.count(first):
            save_checkpoint({'state_dict': {'weight': torch.full((100_000,), float(number))}}, path)
            if time.monotonic() > deadline:
                break
    finally:
        os._exit(1)


def test_kill_while_saving_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / 'last.pth'
    save_checkpoint({'state_dict': {'weight': torch.zeros(100_000)}}, path)
    for kill in range(1, 9):
        before = path.stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            save_for_ever(path, 1_000_000 * kill)
        try:
            deadline = time.monotonic() + 20
            while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02 * random.random())
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        weight = load_checkpoint(path)['state_dict']['weight']
        assert weight[0] >= 1_000_000 * kill and bool((weight == weight[0]).all())


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'metrics.json'
    atomic_write(path, b'old')

    def full_disk(descriptor: int) -> None:
        raise OSError('No space left on device')

    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(OSError, match='No space'):
        atomic_write(path, b'new')
    with pytest.raises(OSError, match='No space'):
        save_checkpoint({'state_dict': {}}, path)
    assert path.read_bytes() == b'old'


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.system, (f'touch {self.target}',)


@pytest.mark.parametrize('writer', ['torch', 'pickle'])
def test_a_checkpoint_cannot_execute_code(config_file: Path, tmp_path: Path, writer: str) -> None:
    file, victim = tmp_path / 'bad.pth', tmp_path / 'executed'
    content = {'state_dict': {'weight': torch.zeros(1)}, 'meta': Attack(victim)}
    if writer == 'torch':
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r'bad.pth is refused.*could execute code'):
        load_checkpoint(file)
    runner = build_runner(load_config(config_file), work_dir=tmp_path / 'run', resume_from=file)
    with pytest.raises(ValueError, match='is refused'):
        runner.train()
    assert not victim.exists()


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'checkpoint not found: .*none.pth'):
        load_checkpoint(tmp_path / 'none.pth')
    whole = tmp_path / 'whole.pth'
    save_checkpoint({'state_dict': {'weight': torch.zeros(1000)}}, whole)
    (tmp_path / 'cut.pth').write_bytes(whole.read_bytes()[:2000])
    (tmp_path / 'empty.pth').write_bytes(b'')
    (tmp_path / 'text.pth').write_text('hello')
    torch.save([1, 2], tmp_path / 'list.pth')
    for name in ('cut', 'empty', 'text', 'list'):
        with pytest.raises(ValueError, match=rf'{name}.pth is (not|refused)'):
            load_checkpoint(tmp_path / f'{name}.pth')


def test_plain_keeps_values_and_drops_objects() -> None:
    import numpy as np

    given = {'a': np.float64(0.5), 'b': [np.int64(3), (True, None)], 'c': lambda: 0, 'd': np.zeros(2), 'e': 'text'}
    result = plain(given)
    assert 'c' not in result and result['a'] == 0.5 and type(result['a']) is float
    assert result['b'] == [3, (True, None)] and type(result['b'][0]) is int and result['b'][1][0] is True
    assert torch.equal(result['d'], torch.zeros(2, dtype=torch.float64)) and result['e'] == 'text'
