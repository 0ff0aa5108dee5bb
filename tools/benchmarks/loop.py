"""What the training loop costs: mmengine's Runner with our hooks against a bare PyTorch loop, same model, same data."""

import copy
import inspect
import time
from typing import Any

import torch
from torch import nn

from densezoo.train import IterLoop, build_runner, load_config
from densezoo.train.loops import batches_from

from .timing import Comparison


class PairedLoop(IterLoop):
    """An IterLoop that runs chunks of its own iterations and of a bare loop on a copy of the model in turn."""

    chunk = 20

    def run(self) -> nn.Module:
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        model: Any = self.runner.model.train()
        bare: Any = copy.deepcopy(model)
        wrapper: Any = self.runner.optim_wrapper
        kind, settings = type(wrapper.optimizer), wrapper.optimizer.defaults
        accepted = inspect.signature(kind).parameters  # defaults hold more than the constructor takes
        optimizer = kind(bare.parameters(), **{name: settings[name] for name in settings if name in accepted})
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=self.max_iters)

        def bare_iteration(batch: dict[str, Any]) -> None:
            data = bare.data_preprocessor(batch, True)
            losses = bare(**data, mode='loss')
            loss = torch.stack([value for name, value in losses.items() if name.startswith('loss')]).sum()
            loss.backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

        # One iterator serves both: two would compete for the cores with their workers.
        batches = batches_from(self.dataloader, 0)
        self.best = {'ours': float('inf'), 'bare': float('inf')}
        while self._iter < self.max_iters:
            for name, iteration in (('ours', self.run_iter), ('bare', bare_iteration)):
                chunk = [next(batches) for _ in range(self.chunk)]
                start = time.perf_counter()
                for batch in chunk:
                    iteration(batch)
                self.best[name] = min(self.best[name], (time.perf_counter() - start) / self.chunk)
        self.runner.call_hook('after_train_epoch')
        return self.runner.model


def run(config: str = 'quickstart/classification', *, iterations: int = 200, work_dir: str) -> list[Comparison]:
    """Seconds per iteration of both loops; batches are loaded before each timed chunk. ratio 0.97 is 3% of overhead."""
    options = load_config(config)
    options.train_cfg = dict(type=PairedLoop, max_iters=iterations, val_interval=iterations)
    options.val_dataloader = options.val_cfg = options.val_evaluator = None
    options.default_hooks = dict(checkpoint=None, pictures=None, summary=None)
    options.train_dataloader.num_workers = 0
    options.train_dataloader.persistent_workers = False
    runner: Any = build_runner(options, work_dir=work_dir)
    runner.train()
    best = runner.train_loop.best
    return [
        Comparison(name=f'training iteration, {config}', ours=best['ours'], peer=best['bare'], peer_name='bare loop')
    ]
