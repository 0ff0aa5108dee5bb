"""Linear layers and convolutions on integers of up to 8 bits, simulated, and Q/DQ pairs in their ONNX files.

    q(x) = clamp(round(x / scale) + zero, -2 ** (b - 1), 2 ** (b - 1) - 1),     x' = (q - zero) * scale

Fewer than 8 bits are stored as int8 that use a part of its range; files clamp before they quantize.
"""

# N outputs, C input channels, K inputs of an output, b bits, G blocks of a row
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRANULARITIES = ('layer', 'channel', 'block')
SCHEMES = ('symmetric', 'asymmetric')


def limits(bits: int) -> tuple[int, int]:
    """The smallest and the largest integer."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@torch.library.custom_op('densezoo::quantize_linear', mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """int8 of floats; scale and zero () or one for each entry of the axis. ONNX's QuantizeLinear."""
    scale, zero = (_along(t, x.ndim, axis) for t in (scale, zero))
    return ((x / scale).round() + zero).clamp(-128, 127).to(torch.int8)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op('densezoo::clip', mutates_args=())
def clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x between two ends that broadcast. An operator, since exporters' optimizers break graphs of Min and Max."""
    return torch.maximum(torch.minimum(x, high), low)


@clip.register_fake
def _(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op('densezoo::dequantize_linear', mutates_args=())
def dequantize_linear(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """Floats of int8. ONNX's DequantizeLinear."""
    scale, zero = (_along(t, x.ndim, axis) for t in (scale, zero))
    return (x.to(scale.dtype) - zero) * scale


@dequantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


def _along(t: Tensor, ndim: int, axis: int) -> Tensor:
    return t if t.ndim == 0 else t.view([-1 if i == axis % ndim else 1 for i in range(ndim)])


class QuantizedLayer(nn.Module):
    """A linear layer or a convolution whose input and weights are integers.

    Args:
        layer: nn.Linear or nn.Conv2d (padded with zeros), copied.
        weight: (N, ...) float, what is quantized in the place of the layer's: its own, times `channel_scale` where
            that is given.
        weight_scale: (N,), or (N, G) of blocks of `block` inputs in a row.
        input_scale: (), or (C,) of each channel.
        input_zero: whole number within the limits of `bits`.
        bits, weight_bits: 2 to 8.
        channel_scale: (C,): the input is divided by it first, and the weights took it over.
        block: width of the blocks; None: there are none.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero: Tensor
    lowest: Tensor | None
    highest: Tensor | None
    channel_inverse: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        *,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        input_zero: int = 0,
        bits: int = 8,
        weight_bits: int = 8,
        channel_scale: Tensor | None = None,
        block: int | None = None,
    ):
        super().__init__()
        self.shape, self.bits, self.block = tuple(weight.shape), bits, block
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1
        self.settings: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            self.settings = dict(
                stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
            )
        integers = round_weight(weight, weight_scale, weight_bits, block)
        self.register_buffer('weight', integers.to(torch.int8))
        self.register_buffer('weight_scale', weight_scale.flatten().clone())
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach().clone())
        self.register_buffer('input_scale', input_scale.clone())
        self.register_buffer('input_zero', torch.full_like(input_scale, input_zero, dtype=torch.int8))
        ends: list[Tensor | None] = [None, None]
        if bits < 8:  # files know 8 bits alone
            shape = (-1, 1, 1) if input_scale.ndim and self.settings is not None else input_scale.shape
            ends = [((limit - input_zero) * input_scale).view(shape) for limit in limits(bits)]
        self.register_buffer('lowest', ends[0])
        self.register_buffer('highest', ends[1])
        self.register_buffer('channel_inverse', None if channel_scale is None else 1 / channel_scale)

    def float_weight(self) -> Tensor:
        """What the integers stand for, in the layer's shape."""
        zero = torch.zeros_like(self.weight_scale, dtype=torch.int8)
        rows = dequantize_linear(self.weight, self.weight_scale, zero, 0)
        return rows.view(self.shape[0], -1)[:, : math.prod(self.shape[1:])].reshape(self.shape)

    def integers(self, x: Tensor) -> Tensor:
        """The input as int8 within its bits."""
        if self.channel_inverse is not None:
            x = x * _along(self.channel_inverse, x.ndim, self.axis)
        if self.lowest is not None and self.highest is not None:
            x = clip(x, self.lowest, self.highest)
        return quantize_linear(x, self.input_scale, self.input_zero, self.axis % x.ndim)

    def forward(self, x: Tensor) -> Tensor:
        x = dequantize_linear(self.integers(x), self.input_scale, self.input_zero, self.axis % x.ndim)
        if self.settings is None:
            return F.linear(x, self.float_weight(), self.bias)
        return F.conv2d(x, self.float_weight(), self.bias, **self.settings)

    def extra_repr(self) -> str:
        return f'{self.shape}, bits={self.bits}, block={self.block}'


def round_weight(weight: Tensor, scale: Tensor, bits: int, block: int | None = None) -> Tensor:
    """Weights as whole numbers, (N, K), or (N G, block), the last block padded with zeros; scale (N,) or (N, G)."""
    rows = weight.detach().flatten(1)
    if block is not None:
        rows = F.pad(rows, (0, -rows.shape[1] % block)).view(-1, block)
    return (rows / scale.flatten()[:, None]).round().clamp(*limits(bits))
