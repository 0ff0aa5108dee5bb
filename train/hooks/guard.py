"""Stop at the first loss that is not a number, and say where it came from."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor


class NonFiniteError(RuntimeError):
    """Training produced a NaN or an infinity; the message names the iteration, the loss terms and the batch's files."""


@HOOKS.register_module()
class NanGuard(Hook):
    """Stop the run when the loss or the gradient's norm is NaN or infinite. The last good checkpoint stays on disk.

    On a GPU the check of an iteration is read one iteration later, so that it never waits for the device.
    """

    priority = 'HIGH'

    def __init__(self) -> None:
        self._pending: tuple[int, Tensor, torch.cuda.Event, dict[str, Tensor], list[str]] | None = None

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Tensor] | None = None
    ) -> None:
        if not outputs:
            return
        wrapper = runner.optim_wrapper
        norm = getattr(wrapper, 'grad_norm', None)
        terms = dict(outputs)
        if norm is not None and getattr(wrapper, 'scaler', None) is None:  # a scaler skips infinite steps itself
            terms['grad_norm'] = norm
        checked = [terms['loss'], terms['grad_norm']] if 'grad_norm' in terms else [terms['loss']]
        if checked[0].device.type != 'cuda':
            if not all(bool(torch.isfinite(value)) for value in checked):
                self._stop(runner, runner.iter + 1, terms, files_of(data_batch))
            return
        self._check_pending(runner)
        good = torch.isfinite(torch.stack([value.float() for value in checked])).all().to('cpu', non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (runner.iter + 1, good, event, terms, files_of(data_batch))

    def after_train_epoch(self, runner: Any) -> None:
        self._check_pending(runner)

    def _check_pending(self, runner: Any) -> None:
        if self._pending is None:
            return
        iteration, good, event, terms, files = self._pending
        self._pending = None
        event.synchronize()
        if not bool(good):
            self._stop(runner, iteration, terms, files)

    def _stop(self, runner: Any, iteration: int, terms: dict[str, Tensor], files: list[str]) -> None:
        values = ', '.join(f'{name}={float(value):.4g}' for name, value in terms.items())
        raise NonFiniteError(
            f'the loss is not finite at iteration {iteration}: {values}; files of the batch: {", ".join(files)}; '
            f'the last good checkpoint stays in {runner.work_dir}'
        )


def files_of(data_batch: Any) -> list[str]:
    """The files that a batch was read from."""
    targets = data_batch.get('targets', []) if isinstance(data_batch, dict) else []
    return [str(target.get('file', '?')) for target in targets]
