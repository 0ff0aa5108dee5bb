"""The five tasks: what each hands to its head."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Task


class ImageClassifier(Task):
    """Image -> class.

    Either a pyramid and a head on it (`features_only=True` with `LinearClassifier`), or a whole classifier of the zoo
    with `OwnClassifier`, whose features are the classifier's logits (B, K).
    """

    def results(self, features: Any, images: Tensor, targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.head.predict(features, [target['size'] for target in targets])


class Segmentor(Task):
    """Image -> class of every pixel: results are masks (H, W) of the picture's original size."""


class Detector(Task):
    """Image -> boxes, labels, scores (and masks) in the picture's original coordinates."""


class UniversalSegmentor(Task):
    """Image -> semantic map, instances and panoptic map at once: results of the picture's original size."""


class Restorer(Task):
    """Degraded image -> clean image: the head sees the images too and returns what to add to them.

    The backbone is a pyramid, or a whole network (`Restormer`, `Histoformer`, `TAT`, `MAT`) under `OwnRestorer`.
    Images are float in [0, 1] (`preprocess=dict(type=Preprocess)` without mean and std); results keep the size of the
    dataset's image, so that they can be compared with `clean`.
    """

    def losses(self, features: Any, images: Tensor, targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return self.head.loss(features, images, targets)

    def results(self, features: Any, images: Tensor, targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.head.predict(features, images, [target['size'] for target in targets])

    def tensors(self, features: Any, images: Tensor) -> Tensor:
        return self.head(features, images)
