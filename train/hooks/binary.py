"""Trainings of binarized backbones: one part becoming binary after the other, and hash functions learned anew."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...backbones.binary import hashes_of, parts_of, set_binary


@HOOKS.register_module()
class BinarySchedule(Hook):
    """Binarize attention and MLPs one after the other, BiViT's cross-layer binarization.

    Before its turn a part is computed in floating point with the same weights; at its turn, learned scales start at the
    mean of what the weights have become. Nothing is counted, so a resumed run goes on where it was. Validation sees the
    binary model at all times: the best checkpoint is never that of a floating-point one.

    Args:
        attention, mlp, merging: fractions of the run's iterations after which the part is binary; parts that the model
            lacks are left alone.
    """

    priority = 'VERY_HIGH'

    def __init__(self, attention: float = 0.0, mlp: float = 0.4, merging: float = 0.4) -> None:
        self.turns = {'attention': attention, 'mlp': mlp, 'merging': merging}
        if any(not 0 <= turn < 1 for turn in self.turns.values()):
            raise ValueError(
                f'attention, mlp and merging must be fractions of the run from 0 to below 1, got {attention=}, '
                f'{mlp=}, {merging=}'
            )
        self._parts: tuple[str, ...] = ()
        self._active: dict[str, bool] = {}

    def before_train(self, runner: Any) -> None:
        self._parts, self._active = parts_of(runner.model), {}
        if not self._parts:
            raise ValueError('BinarySchedule needs a backbone binarized by "bivit"; take the hook out of custom_hooks')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        for part in self._parts:
            turn = round(self.turns[part] * runner.max_iters)
            active = runner.iter >= turn
            if self._active.get(part) != active:
                set_binary(runner.model, part, active, restart=runner.iter == turn > 0)
                self._active[part] = active

    def before_val(self, runner: Any) -> None:
        for part in self._active:
            set_binary(runner.model, part)

    def after_val(self, runner: Any) -> None:
        for part, active in self._active.items():
            set_binary(runner.model, part, active)

    after_train = before_val


@HOOKS.register_module()
class RelearnCodes(Hook):
    """Learn the hash functions of EcoFormer and ShiftAddViT anew, from where they are, as the model changes.

    Without it they are learned from the first batch alone.

    Args:
        interval: iterations between two times.
        until: fraction of the run after which the codes stay as they are.
    """

    priority = 'VERY_HIGH'

    def __init__(self, interval: int = 300, until: float = 0.8) -> None:
        if interval < 1 or not 0 <= until <= 1:
            raise ValueError(f'interval must be positive and until a fraction of the run, got {interval=}, {until=}')
        self.interval, self.until = interval, until

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter and runner.iter % self.interval == 0 and runner.iter <= self.until * runner.max_iters:
            for functions in hashes_of(runner.model):
                functions.forget()
