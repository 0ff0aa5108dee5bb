"""Image classification: global average pooling and a linear layer, or the backbone's own classifier.

Targets: dicts with `label`, an int in 0..K-1 or, after mixup/cutmix, a float tensor (K,) that sums to 1.
Loss: cross-entropy with label smoothing (Szegedy et al. 2016). Results: {'scores': (K,) probabilities, 'label': int}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pyramid import FeatureInfo, PyramidInfo, Size, positive


class OwnClassifier(nn.Module):
    """Loss and decoding for a backbone that is built as a classifier: `features` are its logits (B, K).

    Args:
        num_classes: K, as the backbone was built with.
        label_smoothing: in [0, 1).
    """

    def __init__(self, *, num_classes: int, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f'label_smoothing must be in [0, 1), got {label_smoothing}')
        self.num_classes = positive('num_classes', num_classes)
        self.label_smoothing = label_smoothing

    def forward(self, features: Any) -> Tensor:
        """Logits (B, K)."""
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.num_classes:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f'features must be logits (B, {self.num_classes}), got {got}; '
                'build the backbone with this num_classes and without features_only'
            )
        return features

    def loss(self, features: Any, targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_cls': scalar, 'top1': fraction of this batch whose likeliest label is right, logged only}."""
        logits = self(features).float()
        labels = gather_labels(targets, self.num_classes, logits.device)
        with torch.no_grad():
            hard = labels if labels.ndim == 1 else labels.argmax(1)
            top1 = (logits.argmax(1) == hard).float().mean()
        return {'loss_cls': F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), 'top1': top1}

    def predict(
        self, features: Any, sizes: Sequence[Size] | None = None, original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Any]]:
        """One {'scores': (K,) float probabilities, 'label': int} per picture; sizes play no part."""
        scores = self(features).float().softmax(1)
        return [{'scores': row, 'label': label} for row, label in zip(scores, scores.argmax(1).tolist())]


class LinearClassifier(OwnClassifier):
    """Mean over the pyramid's last map, LayerNorm, dropout, linear layer.

    Args:
        feature_info: channels and strides of the pyramid; only the last map is read.
        num_classes: K.
        label_smoothing: in [0, 1).
        dropout: before the linear layer.
        norm: LayerNorm on the pooled vector (the families' dense forms may lack the classifier's last norm).
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        label_smoothing: float = 0.0,
        dropout: float = 0.0,
        norm: bool = True,
    ):
        super().__init__(num_classes=num_classes, label_smoothing=label_smoothing)
        self.inputs = PyramidInfo.of(feature_info)
        channels = self.inputs.channels()[-1]
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K)."""
        self.inputs.check(features)
        return self.fc(self.dropout(self.norm(features[-1].mean((2, 3)))))


def gather_labels(targets: Sequence[Mapping[str, Any]], num_classes: int, device: torch.device) -> Tensor:
    """Labels of a batch: int64 (B,), or float (B, K) as soon as one of them is soft.

    Raises ValueError for a label outside 0..K-1 or a soft label of another length.
    """
    labels = [t['label'] for t in targets]
    soft = [isinstance(label, Tensor) and label.ndim == 1 for label in labels]
    for label, is_soft in zip(labels, soft):
        if is_soft and label.shape[0] != num_classes:
            raise ValueError(f'soft label must have num_classes={num_classes} entries, got {label.shape[0]}')
        if not is_soft and not 0 <= int(label) < num_classes:
            raise ValueError(
                f'label must be in 0..{num_classes - 1}, got {int(label)}; is num_classes={num_classes} right?'
            )
    if not any(soft):
        return torch.tensor([int(label) for label in labels], device=device)
    rows = [
        label.float() if is_soft else F.one_hot(torch.tensor(int(label)), num_classes).float()
        for label, is_soft in zip(labels, soft)
    ]
    return torch.stack([row.to(device) for row in rows])
