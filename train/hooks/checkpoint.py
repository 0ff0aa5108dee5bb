"""Two files in the work directory: `last.pth` to resume from, `best.pth` to use."""

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..checkpoint import atomic_write
from .guard import NonFiniteError


@HOOKS.register_module()
class Checkpoint(Hook):
    """Write `last.pth` every `interval` iterations (or epochs) and at the end, `best.pth` when a metric improves.

    Both are replaced atomically; weights that are not finite are never written over good ones. `best.pth` holds weights
    only, and `best.json` says which metric it won by.

    Args:
        interval: iterations (epochs with `by_epoch`) between writes of `last.pth`; -1 writes it at the end only.
        by_epoch: count epochs.
        save_best: a metric's name, 'auto' for the first one of the evaluator, None for no `best.pth`.
        rule: 'greater', 'less', or None to guess ('less' for names with 'loss' or 'error' in them).
    """

    priority = 'VERY_LOW'

    def __init__(
        self, interval: int = 1000, by_epoch: bool = False, save_best: str | None = 'auto', rule: str | None = None
    ) -> None:
        if interval == 0 or interval < -1:
            raise ValueError(f'interval must be positive, or -1 for the end only, got {interval=}')
        if rule not in (None, 'greater', 'less'):
            raise ValueError(f"rule must be 'greater', 'less' or None, got {rule=}")
        self.interval = interval
        self.by_epoch = by_epoch
        self.save_best = save_best
        self.rule = rule
        self.best: dict[str, Any] | None = None
        self._saved_at = -1

    def before_train(self, runner: Any) -> None:
        accumulated = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if not self.by_epoch and self.interval > 0 and self.interval % accumulated:
            raise ValueError(
                f'checkpoint.interval must be a multiple of optim_wrapper.accumulative_counts, got '
                f'{self.interval} and {accumulated}: gradients between updates are not saved'
            )
        record = Path(runner.work_dir) / 'best.json'
        if runner.iter > 0 and record.exists():
            self.best = json.loads(record.read_text())

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if (not self.by_epoch and self.interval > 0 and (runner.iter + 1) % self.interval == 0) or (
            not self.by_epoch and runner.iter + 1 == runner.max_iters
        ):
            self._save_last(runner, epoch=runner.epoch, iteration=runner.iter + 1)

    def after_train_epoch(self, runner: Any) -> None:
        done = runner.epoch + 1
        due = self.interval > 0 and done % self.interval == 0
        if self.by_epoch and (due or done == runner.max_epochs):
            self._save_last(runner, epoch=done, iteration=runner.iter)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if not self.save_best or not metrics or runner.train_loop is None:
            return
        name = next(iter(metrics)) if self.save_best == 'auto' else self.save_best
        if name not in metrics:
            raise ValueError(f'checkpoint.save_best={name!r} is not a metric of this run: {sorted(metrics)}')
        value = float(metrics[name])
        if self.best is not None and self.best['metric'] == name and not self._better(name, value, self.best['value']):
            return
        if value != value:  # NaN: the evaluator had nothing to measure
            return
        self.best = {'metric': name, 'value': value, 'iteration': runner.iter}
        runner.save_checkpoint(
            runner.work_dir, 'best.pth', save_optimizer=False, meta={'epoch': runner.epoch, 'iter': runner.iter}
        )
        if is_main_process():
            atomic_write(Path(runner.work_dir) / 'best.json', json.dumps(self.best).encode())

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        for name, tensor in checkpoint['state_dict'].items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f'{name} is not finite at iteration {checkpoint["meta"]["iter"]}; '
                    f'the last good checkpoint stays in {runner.work_dir}'
                )

    def _better(self, name: str, value: float, best: float) -> bool:
        rule = self.rule or ('less' if 'loss' in name or 'error' in name else 'greater')
        return value > best if rule == 'greater' else value < best

    def _save_last(self, runner: Any, *, epoch: int, iteration: int) -> None:
        if iteration != self._saved_at:
            self._saved_at = iteration
            runner.save_checkpoint(runner.work_dir, 'last.pth', meta={'epoch': epoch, 'iter': iteration})
