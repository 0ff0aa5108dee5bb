"""Convolution, batch norm and activation as one layer, on (B, C, H, W) maps with channels_last strides."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.dispatch import inferring
from .conv_act import conv_act, foldable
from .fold_norm import affine_of_batch_norm
from .lookup import choose
from .mlp import ACTIVATIONS


class ConvNorm(nn.Module):
    """[norm](convolution), activated; maps have ceil(size / stride) positions at every size.

    In eager inference the norm is folded into the convolution call by call, and on a CPU the activation is its last
    step: each saves one pass over the map. While training, compiling and exporting all run as they are.

    Args:
        in_dim, dim: channels.
        kernel: odd side of the kernel.
        groups: of the convolution; `in_dim` makes it depthwise.
        bias: of the convolution.
        norm: whether there is a batch norm.
        eps: of the norm.
        act: activation by name; None has none.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        eps: float = 1e-5,
        act: str | None = None,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(dim, eps=eps) if norm else nn.Identity()
        self.act = choose('act', act, ACTIVATIONS)() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and inferring() and type(self.norm) is nn.BatchNorm2d and foldable(self.conv):
            return conv_act(self.conv, self.act, x, self._folded())
        if type(self.norm) is nn.Identity:
            return conv_act(self.conv, self.act, x)
        return self.act(self.norm(self.conv(x)))

    def start_at_zero(self) -> None:
        """Zeros for the norm's weight: what a residual branch ends with, so that its block starts as the identity."""
        norm: Any = self.norm
        nn.init.zeros_(norm.weight)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution with the norm in it."""
        factor, shift = affine_of_batch_norm(self.norm)
        if self.conv.bias is not None:
            shift = torch.addcmul(shift, self.conv.bias, factor)
        return self.conv.weight * factor[:, None, None, None], shift
