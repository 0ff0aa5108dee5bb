"""Norms that change over a training: PRepBN's way from LayerNorm to batch norm."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...backbones.layers import PRepBN


@HOOKS.register_module()
class NormSchedule(Hook):
    """Set the share of LayerNorm of every `PRepBN` from the number of the training iteration; others are left alone.

    The share is 1 for the first `warm` of the run, then falls linearly to 0 at `until` of it. Nothing is counted, so a
    resumed run goes on where it was, whatever was accumulated or recomputed on the way. Set `until=0` to fine-tune
    weights that have been through the schedule: they hold batch norms alone.

    Args:
        warm, until: fractions of the run's iterations.
    """

    priority = 'VERY_HIGH'

    def __init__(self, warm: float = 0.0, until: float = 0.8) -> None:
        if not 0 <= warm <= until <= 1:
            raise ValueError(
                f'warm and until must be fractions of the run with 0 <= warm <= until <= 1, got {warm=}, {until=}'
            )
        self.warm = warm
        self.until = until
        self._norms: list[PRepBN] = []

    def before_train(self, runner: Any) -> None:
        self._norms = [module for module in runner.model.modules() if isinstance(module, PRepBN)]

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        warm = round(self.warm * runner.max_iters)
        steps = round(self.until * runner.max_iters) - warm
        for norm in self._norms:
            norm.set_progress(runner.iter, warm=warm, steps=steps)
