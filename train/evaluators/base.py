"""What the evaluators share: one small measurement per image, gathered over ranks, counted once per image."""

import abc
from collections.abc import Sequence
from typing import Any

from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.evaluator import BaseMetric


class Metric(BaseMetric):
    """Base of the evaluators.

    A subclass measures one image at a time (`measure`) and turns all measurements into named numbers (`summarise`).
    mmengine's own gathering goes through files in the working directory, which several machines do not share, and drops
    the sampler's padding by position; here measurements travel through the process group and are told apart by the
    image's index in the dataset.
    """

    default_prefix = ''  # the names are complete; mmengine warns about None

    def __init__(self) -> None:
        super().__init__()

    @abc.abstractmethod
    def measure(self, image: Any, target: dict[str, Any], result: dict[str, Any]) -> Any:
        """One image's measurement: small, picklable, on the CPU.

        Args:
            image: the dataset's image tensor (C, H, W).
            target: its target (`index`, `image_id`, `original_size` and the task's own keys).
            result: what the task's `predict` returned for it.
        """

    @abc.abstractmethod
    def summarise(self, measurements: list[Any]) -> dict[str, float]:
        """All images' measurements (at least one), each image once, in the dataset's order -> flat names to numbers."""

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict]) -> None:
        """Measure a batch.

        Args:
            data_batch: {'images': list of tensors, 'targets': list of dicts} as collated.
            data_samples: results, one per image, in the batch's order.
        """
        images, targets = data_batch['images'], data_batch['targets']
        if not len(images) == len(targets) == len(data_samples):
            raise ValueError(
                f'{type(self).__name__} needs one result per image, got {len(data_samples)} results for '
                f'{len(targets)} targets and {len(images)} images'
            )
        for image, target, result in zip(images, targets, data_samples, strict=True):
            index = int(target['index'] if 'index' in target else target['image_id'])
            self.results.append((index, self.measure(image, target, result)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """mmengine's hook: (index, measurement) pairs -> metrics; of several with one index the first counts."""
        first: dict[int, Any] = {}
        for index, measurement in results:
            first.setdefault(index, measurement)
        return self.summarise([first[index] for index in sorted(first)])

    def evaluate(self, size: int) -> dict[str, float]:
        """Metrics of everything processed since the last call, on all ranks the same.

        Args:
            size: length of the dataset (mmengine passes it; padding is told by the index, so it is not needed).
        """
        gathered = [pair for part in all_gather_object(self.results) for pair in part]
        self.results.clear()
        if not gathered:
            raise ValueError(f'{type(self).__name__} has nothing to evaluate: the dataloader yielded no image')
        outcome: list[Any] = [None]
        if is_main_process():
            try:
                outcome[0] = self.compute_metrics(gathered)
            except Exception as error:  # raised below on every rank: the others wait for the broadcast
                outcome[0] = error
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]
