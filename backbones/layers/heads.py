"""Classifier heads of the families: from pooled features (B, C) to logits (B, K)."""

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear
from .lookup import choose
from .mlp import SquaredReLU


class LinearHead(nn.Linear):
    """Dropout and one linear layer."""

    last: ClassVar[str] = ''  # path of the last layer within the head

    def __init__(self, dim: int, num_classes: int, drop_rate: float):
        super().__init__(dim, num_classes)
        self.drop_rate = drop_rate
        self.hidden_size = dim

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else super().forward(F.dropout(x, self.drop_rate, self.training))


class MlpHead(nn.Module):
    """Widen, squared ReLU, LayerNorm, dropout, linear. MetaFormer Baselines, arXiv 2210.13452."""

    last: ClassVar[str] = 'fc2'

    def __init__(self, dim: int, num_classes: int, drop_rate: float, ratio: int = 4):
        super().__init__()
        self.hidden_size = ratio * dim
        self.fc1 = Linear(dim, self.hidden_size)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(self.hidden_size)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = Linear(self.hidden_size, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.norm(self.act(self.fc1(x)))
        return x if pre_logits else self.fc2(self.drop(x))


class NoHead(nn.Module):
    """Returns the pooled features."""

    last: ClassVar[str] = ''

    def __init__(self, dim: int):
        super().__init__()
        self.hidden_size = dim

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x


# makes a family's own head from dim, num_classes and drop_rate: a module with `last`, `hidden_size` and pre_logits=
HeadFactory = Callable[[int, int, float], nn.Module]


def build_head(kind: str | HeadFactory, dim: int, num_classes: int, drop_rate: float) -> nn.Module:
    """The head `kind` ('linear', 'mlp' or a family's own); for 0 classes one that returns the features."""
    if num_classes == 0:
        return NoHead(dim)
    heads: dict[str, HeadFactory] = {'linear': LinearHead, 'mlp': MlpHead}
    return (choose('head', kind, heads) if isinstance(kind, str) else kind)(dim, num_classes, drop_rate)
