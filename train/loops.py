"""Training loops that can start anywhere: the sampler is told where to begin, past batches are never loaded again.

A restartable sampler (densezoo.data.RestartableSampler) numbers its draws; `start_at` moves it. With datasets that seed
their augmentation by the draw and `hooks.Reseed`, a resumed run repeats an uninterrupted one bit by bit.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from mmengine.dist import broadcast, get_world_size
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.base_loop import BaseLoop
from mmengine.runner.utils import calc_dynamic_intervals
from torch.utils.data import DataLoader


def batches_from(dataloader: DataLoader, iteration: int) -> Iterator[Any]:
    """The dataloader's batches from `iteration` on."""
    sampler: Any = dataloader.batch_sampler
    if not hasattr(sampler, 'start_at'):
        sampler = dataloader.sampler
    if not hasattr(sampler, 'start_at'):
        raise ValueError(
            'train_dataloader.sampler must be a restartable sampler (densezoo.data.RestartableSampler), '
            f'got {type(sampler).__name__}'
        )
    batch_size: int = dataloader.batch_size or getattr(dataloader.batch_sampler, 'batch_size', 1)  # type: ignore[assignment]
    sampler.start_at(iteration * batch_size * get_world_size())
    return iter(dataloader)


def sync_buffers(model: torch.nn.Module) -> None:
    """Give every rank the buffers of rank 0 (running statistics differ between ranks), so that all validate alike."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            broadcast(buffer)


@LOOPS.register_module()
class IterLoop(IterBasedTrainLoop):
    """Train for `max_iters` iterations, validating every `val_interval` and at the end.

    Args:
        max_iters: total iterations (batches; with gradient accumulation not every one updates the parameters).
        val_interval, val_begin, dynamic_intervals: as in mmengine's IterBasedTrainLoop.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader | dict[str, Any],
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
    ) -> None:
        # Not IterBasedTrainLoop's constructor: it starts the workers before the run knows where to resume.
        BaseLoop.__init__(self, runner, dataloader)
        if max_iters < 1 or val_interval < 1:
            raise ValueError(f'max_iters and val_interval must be at least 1, got {max_iters=}, {val_interval=}')
        self._max_iters = int(max_iters)
        self._max_epochs = 1
        self._epoch = 0
        self._iter = 0
        self.val_begin = val_begin
        self.val_interval = val_interval
        self.stop_training = False
        self.dynamic_milestones, self.dynamic_intervals = calc_dynamic_intervals(val_interval, dynamic_intervals)
        self.runner.visualizer.dataset_meta = getattr(self.dataloader.dataset, 'metainfo', None)

    def run(self) -> torch.nn.Module:
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        batches = batches_from(self.dataloader, self._iter) if self._iter < self._max_iters else iter(())
        while self._iter < self._max_iters and not self.stop_training:
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            if self._validates_now():
                sync_buffers(self.runner.model)
                self.runner.val_loop.run()
                self.runner.model.train()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _validates_now(self) -> bool:
        due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        return due and self._iter >= self.val_begin and self.runner.val_loop is not None


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """Train for `max_epochs` passes over the dataset; each epoch starts its sampler at its own place.

    Args: as mmengine's EpochBasedTrainLoop (max_epochs, val_begin, val_interval, dynamic_intervals).
    """

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        length = len(self.dataloader)
        batches = batches_from(self.dataloader, self._epoch * length)
        for index, batch in enumerate(islice(batches, length)):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        sync_buffers(self.runner.model)


def unwrapped(model: torch.nn.Module) -> Any:
    """The task inside a distributed wrapper, or the model itself."""
    return model.module if is_model_wrapper(model) else model
