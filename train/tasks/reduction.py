"""Training a classifier whose blocks reduce tokens: a method's own losses, and reduction consistency (MCTF).

Consistency, arXiv 2403.10030: beside the model as it reduces (the student) runs the same model with a smaller number of
removals, drawn anew in each iteration (the teacher). Both are trained on the labels, and the class tokens of both,
after the last norm, are drawn together for images that the student recognises. In a config

    model = dict(
        type=ReducedClassifier,
        backbone=dict(type=create_model, name='deit_small_patch16_224', reduction=dict(type='mctf', r=16)),
        head=dict(type=OwnClassifier, num_classes=1000),
        consistency=dict(r_max=16),
    )
"""

# B images, P prefix tokens, C channels
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...heads.classification import gather_labels
from .kinds import ImageClassifier


class ReducedClassifier(ImageClassifier):
    """A classifier of the zoo with `reduction`.

    Args:
        backbone: dict(type=create_model, name=..., reduction=dict(type=..., ...), ...), or a module.
        consistency: None, or dict with
            r_max: the teacher removes from 0 to below this many tokens per block; below 1 a share of them;
            weight: of the term between both, 3 (the authors' value);
            teacher_weight: of the teacher's own loss, 1;
            threshold: probability that the student must give to an image's class, 0.4, for the term to count.
        The others: as in `Task`.

    Raises:
        ValueError: the backbone has no reduction, or for consistency no prefix token; a setting has no such value.
        TypeError: there is no such setting.
    """

    def __init__(self, *, consistency: Mapping[str, float] | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        reduction = getattr(self.backbone, 'reduction', None)
        if reduction is None:
            raise ValueError(
                'ReducedClassifier needs a backbone with a reduction: create_model(..., reduction=dict(type=...))'
            )
        self.consistency = None if consistency is None else _settings(consistency)
        if self.consistency is not None and not reduction.prefix:
            raise ValueError('consistency compares class tokens, and the backbone has none')

    def losses(self, features: Any, images: Tensor, targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The head's terms, `loss_<name>` for each penalty of the method, and with consistency `loss_teacher` and
        `loss_consistency`."""
        losses = super().losses(features, images, targets)
        reduction = self.backbone.reduction
        if reduction.final is None:
            return losses
        student, reduction.final = reduction.final, None
        losses |= {f'loss_{name}': term for name, term in reduction.penalties(student).items()}
        if self.consistency is None:
            return losses
        logits, token = self._taught(images)
        for name, term in super().losses(logits, images, targets).items():
            if name.startswith('loss'):
                losses[name.replace('cls', 'teacher')] = self.consistency['teacher_weight'] * term
        distance = self.distance(self._class_tokens(student.x), token)
        labels = gather_labels(targets, self.head.num_classes, distance.device)
        with torch.no_grad():
            scores = features.float().softmax(1)
            own = scores.gather(1, labels[:, None])[:, 0] if labels.ndim == 1 else (scores * (labels > 0)).sum(1)
            counted = (own > self.consistency['threshold']).float()
        losses['loss_consistency'] = (
            self.consistency['weight'] * (distance * counted).sum() / counted.sum().clamp_min(1)
        )
        return losses

    @staticmethod
    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared difference of each image's class tokens, (B, P, C) twice -> (B,)."""
        return (student.float() - teacher.float()).square().mean((1, 2))

    def _taught(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and class tokens of the same model with fewer removals."""
        assert self.consistency is not None
        student, largest = self.backbone.reduction, self.consistency['r_max']
        amount: int | float
        if largest < 1:
            amount = int(torch.randint(0, max(int(100 * largest), 1), ())) / 100
        else:
            amount = int(torch.randint(0, int(largest), ()))
        # a copy that shares the weights, so that what checkpointing computes again has this schedule too
        teacher = copy.copy(student)
        teacher.schedule = student.schedule.with_amount(amount)
        try:
            self.backbone.reduction = teacher
            logits = self.backbone(images)
        finally:
            self.backbone.reduction = student
        final, teacher.final = teacher.final, None
        return logits, self._class_tokens(final.x)

    def _class_tokens(self, x: Tensor) -> Tensor:
        return self.backbone.norm(x[:, : self.backbone.reduction.prefix])


def _settings(given: Mapping[str, float]) -> dict[str, float]:
    defaults = {'r_max': 16, 'weight': 3.0, 'teacher_weight': 1.0, 'threshold': 0.4}
    for name, value in given.items():
        if name not in defaults:
            raise TypeError(f'consistency has no setting {name}={value!r}; it takes {", ".join(defaults)}')
        if not isinstance(value, int | float) or value < 0:
            raise ValueError(f'consistency: {name} must not be negative, got {name}={value!r}')
    return {**defaults, **given}
