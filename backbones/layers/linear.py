"""nn.Linear with the faster product that eager inference on a CPU has; parameters, names and values are the same."""

from typing import TypeGuard

from torch import Tensor, nn

from ...kernels import linear


class Linear(nn.Linear):
    """nn.Linear whose eager inference on a CPU runs by `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and no more: binary and quantized ones are subclasses too."""
    return type(module) in (nn.Linear, Linear)
