"""What a finished run leaves: metrics.json, curves.png and a table on the console."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from rich.console import Console
from rich.table import Table

from ..checkpoint import atomic_write
from ..visualize import curves
from .log import read_log


@HOOKS.register_module()
class Summary(Hook):
    """Write `metrics.json` (flat names to numbers) and `curves.png`, and print the metrics as a table.

    metrics.json holds the last validation's metrics under the evaluator's own names, `iterations`, `seconds` (of
    training, earlier parts of a resumed run included) and `peak_memory_mib` (of the GPU; on a CPU of the process).

    Args:
        curves: draw curves.png.
    """

    priority = 'LOWEST'

    def __init__(self, curves: bool = True) -> None:
        self.curves = curves
        self.metrics: dict[str, float] = {}
        self._start = time.monotonic()
        self._before = 0.0
        self._resumed_at = 0

    def before_train(self, runner: Any) -> None:
        self._start = time.monotonic()
        self._resumed_at = runner.iter
        self._before = float(runner.message_hub.runtime_info.get('seconds', 0.0)) if runner.iter > 0 else 0.0

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint['message_hub']['runtime_info']['seconds'] = self.seconds

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self.metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if self.metrics and runner.train_loop is not None:
            line = '  '.join(f'{name} {value:.4f}' for name, value in self.metrics.items())
            runner.logger.info(f'validation at iteration {runner.iter}: {line}')

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self.metrics = {name: float(value) for name, value in (metrics or {}).items()}
        if is_main_process():
            print_table(self.metrics, 'test')

    def after_train(self, runner: Any) -> None:
        if not is_main_process():
            return
        if self._resumed_at >= runner.max_iters:
            runner.logger.info(f'already trained for {runner.iter} iterations: nothing was done')
            return
        result = {
            **self.metrics,
            'iterations': runner.iter,
            'seconds': round(self.seconds, 2),
            'peak_memory_mib': round(peak_memory_mib(), 1),
        }
        folder = Path(runner.work_dir)
        atomic_write(folder / 'metrics.json', (json.dumps(result, indent=2) + '\n').encode())
        if self.curves:
            curves(read_log(folder / 'log.jsonl'), folder / 'curves.png')
        print_table(result, runner.work_dir)

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start


def peak_memory_mib() -> float:
    """Peak memory: of the GPU's allocator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def print_table(metrics: dict[str, float], title: str) -> None:
    table = Table('metric', 'value', title=title)
    for name, value in metrics.items():
        table.add_row(name, f'{value:.4f}' if isinstance(value, float) else str(value))
    Console().print(table)
