"""Channel MLPs and the activations of the MetaFormer families, on (..., C) tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lookup import choose


class StarReLU(nn.Module):
    """scale * relu(x)^2 + bias with one learnable scale and bias per module. MetaFormer Baselines, arXiv 2210.13452."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if torch.is_grad_enabled():
            return torch.addcmul(self.bias, x.square(), self.scale)
        return x.square_().mul_(self.scale).add_(self.bias)  # allocating maps of this size costs more than the sums


class SquaredReLU(nn.Module):
    """relu(x)^2. Primer, arXiv 2109.08668."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    'gelu': nn.GELU,
    'relu': nn.ReLU,
    'star_relu': StarReLU,
    'squared_relu': SquaredReLU,
}


class Mlp(nn.Module):
    """Linear, activation, linear on the last dimension."""

    def __init__(self, *, dim: int, ratio: float = 4.0, act: str = 'gelu', bias: bool = True):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = choose('act', act, ACTIVATIONS)()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
