"""Tasks that learn from a teacher too: a trained backbone whose logits or maps the student's are drawn to.

    densezoo train quickstart/classification_swin          # the teacher
    densezoo train quickstart/classification_bivit         # model.type=DistilledClassifier

`DistilledClassifier`, `DistilledSegmentor`, `DistilledDetector` and `DistilledRestorer` are the tasks of these names
with three more arguments. The teacher is no part of the task: it is in no checkpoint, and no optimizer sees it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...backbones import load_checkpoint
from ...backbones.binary import balance_loss
from .base import Task
from .kinds import Detector, ImageClassifier, Restorer, Segmentor


class Distilled(Task):
    """Adds to a task's losses

    - `loss_logits`, for classifiers: `logits` T^2 KL(softmax(teacher / T), softmax(student / T)), the mean over images;
    - `loss_features`: `features` times the mean squared difference of the backbones' maps, each position normalised
      over its channels, the mean over stages (of plain classifiers: over blocks);
    - `loss_balance`: `balance` times the balancing losses of gates, where the backbone has any with such a loss
      (`binary.balance_loss`).

    Args:
        teacher: dict(type=create_model, name=..., ...), a backbone of the student's form: a classifier for a
            classifier, else in dense form; or a module; None trains without.
        checkpoint: file with the teacher's weights, read when training starts: its own or a whole run's best.pth.
        start: the student starts from the teacher's weights, as far as `load_checkpoint` takes them.
        logits, features, balance: weights of the terms; 0 leaves a term out.
        temperature: T.
        The others: see `Task`.

    Raises:
        ValueError: a weight is negative, the temperature is not positive, or both weights are 0.
    """

    _teacher: nn.Module | None

    def __init__(
        self,
        *,
        backbone: dict[str, Any] | nn.Module,
        head: dict[str, Any] | nn.Module,
        neck: dict[str, Any] | nn.Module | None = None,
        preprocess: dict[str, Any] | nn.Module | None = None,
        grad_checkpointing: bool = False,
        teacher: dict[str, Any] | nn.Module | None = None,
        checkpoint: str = '',
        start: bool = False,
        logits: float = 1.0,
        features: float = 0.0,
        balance: float = 0.01,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(
            backbone=backbone, head=head, neck=neck, preprocess=preprocess, grad_checkpointing=grad_checkpointing
        )
        if min(logits, features, balance) < 0 or temperature <= 0:
            raise ValueError(
                f'logits, features and balance must not be negative, temperature must be positive, got {logits=}, '
                f'{features=}, {balance=}, {temperature=}'
            )
        if teacher is not None and not logits and not features and not start:
            raise ValueError(f'a teacher needs a weight above 0 or start=True, got {logits=}, {features=}, {start=}')
        self.teacher_config, self.checkpoint, self.start = teacher, checkpoint, start
        self.logits, self.features, self.balance, self.temperature = logits, features, balance, temperature
        self._maps: Sequence[Tensor] = ()
        object.__setattr__(self, '_teacher', None)  # not a submodule

    def init_weights(self) -> None:
        """Builds the teacher, and starts the student from it. The Runner calls this before it trains or resumes."""
        if self.teacher_config is not None:
            teacher = self.teacher
            if self.start:
                load_checkpoint(self.backbone, teacher.state_dict())

    @property
    def teacher(self) -> nn.Module:
        """The teacher in evaluation mode, built and loaded at first use.

        Raises:
            FileNotFoundError: its weights are not there.
        """
        if self._teacher is None:
            config: Any = self.teacher_config
            teacher = config if isinstance(config, nn.Module) else MODELS.build(config)
            if self.checkpoint:
                try:
                    load_checkpoint(teacher, self.checkpoint)
                except FileNotFoundError:
                    raise FileNotFoundError(
                        f"the teacher's weights {self.checkpoint} are not there; train it first, or set "
                        'model.checkpoint to where they are'
                    ) from None
            object.__setattr__(self, '_teacher', teacher.eval().requires_grad_(False))
        assert self._teacher is not None
        return self._teacher

    def extract_features(self, images: Tensor) -> Any:
        if not (self.training and self.features and self.teacher_config is not None):
            return super().extract_features(images)
        self._maps, out = _read(self.backbone, images)
        return out if self.neck is None else self.neck(out)

    def losses(self, features: Any, images: Tensor, targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        terms = super().losses(features, images, targets)
        balancing = balance_loss(self.backbone) if self.balance else None
        if balancing is not None:
            terms['loss_balance'] = self.balance * balancing
        if self.teacher_config is None or not (self.logits or self.features) or not self.training:
            return terms
        teacher = self.teacher.to(images.device)
        with torch.no_grad():
            maps, out = _read(teacher, images) if self.features else ((), teacher(images))
        if self.logits and isinstance(out, Tensor):
            terms['loss_logits'] = self.logits * self._divergence(features, out)
        if self.features:
            terms['loss_features'] = self.features * _distance(self._maps, maps)
            self._maps = ()
        return terms

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise ValueError(f'teacher and student must have the same classes, got {teacher.shape=}, {student.shape=}')
        T = self.temperature
        student, teacher = ((logits.float() / T).log_softmax(1) for logits in (student, teacher))
        return T * T * F.kl_div(student, teacher, log_target=True, reduction='batchmean')


class DistilledClassifier(Distilled, ImageClassifier):
    """`ImageClassifier` with a teacher."""


class DistilledSegmentor(Distilled, Segmentor):
    """`Segmentor` with a teacher."""


class DistilledDetector(Distilled, Detector):
    """`Detector` with a teacher."""


class DistilledRestorer(Distilled, Restorer):
    """`Restorer` with a teacher."""


def _read(backbone: Any, images: Tensor) -> tuple[Sequence[Tensor], Any]:
    """Maps, and what the backbone gives: logits, or the maps again."""
    if getattr(backbone, 'features_only', False):
        maps = backbone(images)
        return maps, maps
    final, maps = backbone.forward_intermediates(images)
    return maps, backbone.forward_head(final)


def _distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(tuple(m.shape) for m in maps) for maps in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f'features of teacher and student must have equal shapes, got {shapes[1]} and {shapes[0]}; set features=0'
        )
    pairs = [[F.layer_norm(m.movedim(1, -1).float(), m.shape[1:2]) for m in pair] for pair in zip(student, teacher)]
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in pairs]).mean()
