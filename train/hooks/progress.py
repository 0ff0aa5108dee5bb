"""A progress bar with loss, speed and time left, on terminals."""

import logging
import sys
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@HOOKS.register_module()
class ProgressBar(Hook):
    """Show training and validation as bars. Off when the output is not a terminal, and on all ranks but the first.

    While the bars are up the logger's console handler is replaced by one that prints above them (and leaves out the
    lines that the bar shows already); files are untouched. `close` puts the old handler back; Runner calls it after an
    exception too.
    """

    priority = 'LOW'

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._old_handler: logging.Handler | None = None
        self._logger: logging.Logger | None = None
        self._training: TaskID | None = None
        self._validation: TaskID | None = None

    def before_train(self, runner: Any) -> None:
        if not is_main_process() or not sys.stdout.isatty():
            return
        self._progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[note]}'),
            TimeRemainingColumn(),
            refresh_per_second=4,
        )
        self._training = self._progress.add_task('train', total=runner.max_iters, completed=runner.iter, note='')
        self._swap_console(runner.logger)
        self._progress.start()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._progress is None or self._training is None:
            return
        scalars = runner.message_hub.log_scalars
        note = f'loss {scalars["train/loss"].current():.4f}' if 'train/loss' in scalars else ''
        self._progress.update(self._training, completed=runner.iter + 1, note=note)

    def before_val_epoch(self, runner: Any) -> None:
        if self._progress is not None:
            self._validation = self._progress.add_task('validate', total=len(runner.val_dataloader), note='')

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._progress is not None and self._validation is not None:
            self._progress.update(self._validation, completed=batch_idx + 1)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if self._progress is not None and self._validation is not None:
            self._progress.remove_task(self._validation)
            self._validation = None

    def after_train(self, runner: Any) -> None:
        self.close(runner)

    def close(self, runner: Any) -> None:
        """Take the bars down and restore the console; any number of times."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._logger is not None and self._old_handler is not None:
            handlers = self._logger.handlers
            handlers[:] = [self._old_handler if isinstance(h, _AboveTheBar) else h for h in handlers]
            self._logger = self._old_handler = None

    def _swap_console(self, logger: logging.Logger) -> None:
        assert self._progress is not None
        for index, handler in enumerate(logger.handlers):
            # FileHandler is a StreamHandler too: only the console is meant.
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                self._old_handler, self._logger = handler, logger
                logger.handlers[index] = _AboveTheBar(self._progress, handler)
                return


class _AboveTheBar(logging.Handler):
    """Print log records above the bars."""

    def __init__(self, progress: Progress, old: logging.Handler) -> None:
        super().__init__(old.level)
        self._progress = progress
        self.setFormatter(logging.Formatter('%(message)s'))

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, 'shown_by_bar', False):
            self._progress.console.print(self.format(record), markup=False, highlight=False)
