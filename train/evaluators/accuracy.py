"""Top-k accuracy."""

from collections.abc import Sequence
from typing import Any

import torch

from .base import Metric


class Accuracy(Metric):
    """'accuracy/top<k>': share of images whose label is among the k highest scores (0..1).

    Results need `scores` (K,); targets an integer `label`. Among equal scores the lower class comes first, so a network
    that answers the same for all classes is not right by accident; scores that are not finite are wrong.

    Args:
        topk: the k to report; a k above the number of classes counts as all of them.
    """

    def __init__(self, *, topk: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        if not topk or any(not isinstance(k, int) or k < 1 for k in topk):
            raise ValueError(f'topk must be positive whole numbers, got {topk=}')
        self.topk = tuple(topk)

    def measure(self, image: Any, target: dict[str, Any], result: dict[str, Any]) -> int:
        """How many classes come before the label."""
        scores, label = torch.as_tensor(result['scores']).detach().float().cpu(), int(target['label'])
        if not 0 <= label < len(scores):
            raise ValueError(f'{target.get("file", "image")}: {label=} is not among the {len(scores)} classes')
        if not scores.isfinite().all():
            return len(scores) + max(self.topk)
        before = (scores > scores[label]).sum() + (scores[:label] == scores[label]).sum()
        return int(before)

    def summarise(self, measurements: list[int]) -> dict[str, float]:
        """Share of ranks below each k."""
        return {f'accuracy/top{k}': sum(rank < k for rank in measurements) / len(measurements) for k in self.topk}
