"""Channel MLPs and the activations of the MetaFormer families, on (..., C) tensors."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import inferring
from .conv_act import conv_act
from .grid import to_first
from .linear import Linear
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


class InPlaceGELU(nn.GELU):
    """GELU that overwrites its input in eager inference: for what a layer has just made and nobody else reads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x, approximate=self.approximate) if inferring() else super().forward(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    'gelu': nn.GELU,
    'gelu_tanh': partial(nn.GELU, approximate='tanh'),
    'relu': nn.ReLU,
    'star_relu': StarReLU,
    'squared_relu': SquaredReLU,
    'hardswish': nn.Hardswish,
    'silu': nn.SiLU,
}


class Mlp(nn.Module):
    """Linear, activation, linear on the last dimension."""

    first_linears: ClassVar[tuple[str, ...]] = ('fc1',)
    last_linear: ClassVar[str] = 'fc2'

    def __init__(self, *, dim: int, ratio: float = 4.0, act: str = 'gelu', bias: bool = True):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = Linear(dim, hidden, bias=bias)
        self.act = InPlaceGELU() if act == 'gelu' else choose('act', act, ACTIVATIONS)()
        self.fc2 = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvMlp(nn.Module):
    """Linear, 3x3 depthwise convolution, activation, linear on (B, H, W, C). PVTv2, arXiv 2106.13797.

    Args:
        extra_act: a ReLU before the convolution, as PVTv2's linear attention variants have it.
    """

    first_linears: ClassVar[tuple[str, ...]] = ('fc1',)
    last_linear: ClassVar[str] = 'fc2'

    def __init__(self, *, dim: int, ratio: float = 4.0, act: str = 'gelu', extra_act: bool = False):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = Linear(dim, hidden)
        self.extra_act = nn.ReLU(inplace=True) if extra_act else nn.Identity()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = choose('act', act, ACTIVATIONS)()
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.extra_act(self.fc1(x))
        return self.fc2(conv_act(self.dwconv, self.act, to_first(x)).permute(0, 2, 3, 1))
