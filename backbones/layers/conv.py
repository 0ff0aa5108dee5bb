"""Convolution, batch norm and activation as one layer, on (B, C, H, W) maps with channels_last strides."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold_norm import affine_of_batch_norm
from .lookup import choose
from .mlp import ACTIVATIONS

_IN_PLACE = {'relu': F.relu, 'hardswish': F.hardswish, 'silu': F.silu}


class ConvNorm(nn.Module):
    """[norm](convolution), activated; maps have ceil(size / stride) positions at every size.

    In eager inference the norm is folded into the convolution call by call, which saves one pass over the map; while
    training, compiling and exporting both run as they are.

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
        self.in_place = _IN_PLACE.get(act or '')

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.act(self.norm(self.conv(x)))
        x = self._folded(x) if type(self.norm) is nn.BatchNorm2d else self.conv(x)
        return self.in_place(x, inplace=True) if self.in_place is not None else self.act(x)

    def start_at_zero(self) -> None:
        """Zeros for the norm's weight: what a residual branch ends with, so that its block starts as the identity."""
        norm: Any = self.norm
        nn.init.zeros_(norm.weight)

    def _folded(self, x: Tensor) -> Tensor:
        conv = self.conv
        factor, shift = affine_of_batch_norm(self.norm)
        if conv.bias is not None:
            shift = torch.addcmul(shift, conv.bias, factor)
        weight = conv.weight * factor[:, None, None, None]
        return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
