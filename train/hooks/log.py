"""What a run writes down: console, log file, CSV, JSON lines, TensorBoard."""

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor


@HOOKS.register_module()
class Log(Hook):
    """Average the losses over `interval` iterations and write them, with learning rate and times, everywhere.

    Between two writes an iteration costs a list append: loss tensors are read (and the device waited for) at the
    interval only. Files in the work directory: `train.csv`, `val.csv`, `log.jsonl` (both kinds, one object per line);
    TensorBoard events through mmengine's visualizer.

    Args:
        interval: iterations between two writes.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int = 20) -> None:
        if interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval=}')
        self.interval = interval
        self._losses: list[Mapping[str, Tensor]] = []
        self._since = self._waiting = self._data_seconds = 0.0

    def before_train(self, runner: Any) -> None:
        hub = runner.message_hub
        hub.update_info_dict({'max_iters': runner.max_iters, 'max_epochs': runner.max_epochs, 'iter': runner.iter})
        self._restart_clock()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._data_seconds += time.perf_counter() - self._waiting

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._losses.append(outputs or {})
        done = runner.iter + 1
        runner.message_hub.update_info('iter', done)
        if done % self.interval == 0 or done == runner.max_iters:
            self._write_losses(runner, done)
        self._waiting = time.perf_counter()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if metrics and runner.train_loop is not None:
            for name, value in metrics.items():
                runner.message_hub.update_scalar(f'val/{name}', float(value))
            self._write(runner, 'val', runner.iter, {name: float(value) for name, value in metrics.items()})
        self._restart_clock()

    def _write_losses(self, runner: Any, done: int) -> None:
        names = list(dict.fromkeys(name for losses in self._losses for name in losses))
        row: dict[str, float] = {
            name: float(torch.stack([losses[name].float() for losses in self._losses if name in losses]).mean())
            for name in names
        }
        norm = getattr(runner.optim_wrapper, 'grad_norm', None)
        if norm is not None:
            row['grad_norm'] = float(norm)
        count = len(self._losses)
        row['lr'] = max(group['lr'] for group in runner.optim_wrapper.param_groups)
        row['time'] = (time.perf_counter() - self._since) / count
        row['data_time'] = self._data_seconds / count
        for name, value in row.items():
            runner.message_hub.update_scalar(f'train/{name}', value)
        self._restart_clock()
        self._write(runner, 'train', done, row)
        left = (runner.max_iters - done) * row['time']
        runner.logger.info(
            f'[{done}/{runner.max_iters}] '
            + '  '.join(f'{name} {value:.4g}' for name, value in row.items())
            + f'  eta {time.strftime("%H:%M:%S", time.gmtime(left))}',
            extra={'shown_by_bar': True},
        )

    def _restart_clock(self) -> None:
        self._losses = []
        self._since = self._waiting = time.perf_counter()
        self._data_seconds = 0.0

    def _write(self, runner: Any, kind: str, step: int, row: Mapping[str, float]) -> None:
        if not is_main_process():
            return
        folder = Path(runner.work_dir)
        with open(folder / 'log.jsonl', 'a') as file:
            file.write(json.dumps({'kind': kind, 'step': step, **row}) + '\n')
        append_csv(folder / f'{kind}.csv', {'step': step, **row})
        runner.visualizer.add_scalars({f'{kind}/{name}': value for name, value in row.items()}, step=step)


def append_csv(path: Path, row: Mapping[str, float]) -> None:
    """Append a row; columns that the file does not have yet are added to it."""
    old: list[dict[str, str]] = []
    columns = list(row)
    if path.exists():
        with open(path, newline='') as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            missing = [name for name in row if name not in columns]
            if missing:
                old = list(reader)
                columns += missing
    rewrite = bool(old) or not path.exists()
    with open(path, 'w' if rewrite else 'a', newline='') as file:
        writer = csv.DictWriter(file, columns)
        if rewrite:
            writer.writeheader()
            writer.writerows(old)
        writer.writerow(row)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a `log.jsonl` in order of iterations; what a resumed run wrote again replaces the old."""
    latest: dict[tuple[int, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        latest[row['step'], row['kind']] = row
    return [latest[key] for key in sorted(latest)]
