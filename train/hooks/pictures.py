"""Pictures of predictions at each validation."""

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..visualize import save_pictures


@HOOKS.register_module()
class Pictures(Hook):
    """Draw the first `count` validation images with their predictions and truths, at each validation, into
    `WORK_DIR/predictions/iter_<iteration>/`, with all of them on `sheet.png`.

    Args:
        count: images per validation; 0 draws none.
        score_threshold: detections below it are not drawn.
    """

    def __init__(self, count: int = 12, score_threshold: float = 0.3) -> None:
        if count < 0:
            raise ValueError(f'count must not be negative, got {count=}')
        self.count = count
        self.score_threshold = score_threshold
        self._images: list[Any] = []
        self._targets: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []

    def before_val_epoch(self, runner: Any) -> None:
        self._images, self._targets, self._results = [], [], []

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        missing = self.count - len(self._images)
        if missing > 0 and is_main_process():
            self._images += data_batch['images'][:missing]
            self._targets += data_batch['targets'][:missing]
            self._results += list(outputs)[:missing]

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if self._images:
            save_pictures(
                Path(runner.work_dir) / 'predictions' / f'iter_{runner.iter:06d}',
                self._images,
                self._results,
                self._targets,
                getattr(runner.val_dataloader.dataset, 'metainfo', None),
                score_threshold=self.score_threshold,
            )
        self._images, self._targets, self._results = [], [], []
