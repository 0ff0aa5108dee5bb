"""Binarization with the gradients of their authors: the value is a step, the gradient that of something smooth.

Signs and steps pass the gradient where the input lies strictly inside a window and stop it elsewhere; sign(0) = 0.
Sources: BiViT, arXiv 2211.07091, authors' code https://github.com/ThisisBillhe/BiViT; EcoFormer, arXiv 2209.09004,
https://github.com/ziplab/EcoFormer (Apache-2.0); elastic binarization, BiT, arXiv 2205.13016, after LSQ, 1902.08153;
powers of two, DeepShift, arXiv 1905.13298, as in https://github.com/GATECH-EIC/ShiftAddViT (Apache-2.0).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...kernels import fixed_point as round_down


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; the gradient passes where -1 < x < 1."""
    return _Sign.apply(x) if learns(x) else x.sign()


def step(x: Tensor, low: float = -1.0) -> Tensor:
    """1 where x > 0, else 0; the gradient passes where low < x < 1."""
    return _Step.apply(x, low) if learns(x) else (x > 0).to(x.dtype)


def scaled_step(x: Tensor) -> Tensor:
    """`step` times the mean of the positive entries of the whole tensor, with the gradient of `step`."""
    positive, ones = x.detach().clamp(min=0), step(x)
    scale = positive.sum() / (positive > 0).sum().clamp(min=1)
    return ones + ones.detach() * (scale - 1)


def softmax_step(logits: Tensor, threshold: float = 0.25) -> Tensor:
    """1 where the softmax over the last dimension reaches `threshold` times the row's largest, else 0.

    The gradient is that of the softmax. BiViT's softmax-aware binarization: rows are neither scaled nor normalised.

    Args:
        logits: (..., N), finite but for entries of -inf, which never count.
        threshold: from above 0 to 1.
    """
    # p >= t max(p), without the exponentials
    reached = (logits >= logits.amax(-1, keepdim=True) + math.log(threshold)).to(logits.dtype)
    if not learns(logits):
        return reached
    soft = logits.softmax(-1)
    return reached + (soft - soft.detach())


def power_of_two(shift: Tensor, signs: Tensor, lowest: int) -> Tensor:
    """2^round(clamp(shift, lowest, 0)) * sign(round(signs)); rounding is half to even, so |signs| <= 0.5 gives 0.

    Clamping and rounding pass all gradients: d/dshift = value * ln 2, and d/dsigns = 1, as the authors have it (not
    2^shift).
    """
    return _PowerOfTwo.apply(shift, signs, lowest) if learns(shift) or learns(signs) else _power(shift, signs, lowest)


def nearest_power(weight: Tensor, lowest: int) -> Tensor:
    """sign(w) 2^round(log2 |w|) of |w| clamped to 2^lowest .. 1, zeros stay 0; the gradient passes unchanged."""
    return _NearestPower.apply(weight, lowest) if learns(weight) else _nearest(weight, lowest)


def fixed_point(x: Tensor, integer_bits: int = 16, fraction_bits: int = 16) -> Tensor:
    """floor(x 2^f) / 2^f within -2^(i-1) .. 2^(i-1) - 1; the gradient passes unchanged."""
    return (
        _FixedPoint.apply(x, integer_bits, fraction_bits) if learns(x) else round_down(x, integer_bits, fraction_bits)
    )


def split_power(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(round(log2 |w|), sign(w)): what `power_of_two` makes a weight of again. The exponent of 0 is 0."""
    signs = weight.sign()
    return torch.where(signs == 0, torch.zeros_like(weight), weight.abs().log2()).round(), signs


class ElasticQuantizer(nn.Module):
    """x / alpha rounded to `bits` bits, times alpha; alpha is learned. BiT's elastic binarization.

    One signed bit is sign(x) alpha. Unsigned values of several bits count from the tensor's smallest value.

    Args:
        bits: at least 1.
        signed: codes from -2^(bits-1), or -1 for one bit, or from 0.

    Attributes:
        alpha: (1,), set from the first batch that is trained on: 2 mean|x| / sqrt(Q), unsigned 4 mean|x| / sqrt(Q),
            with Q the largest code.
    """

    started: Tensor

    def __init__(self, *, bits: int = 1, signed: bool = True):
        super().__init__()
        if bits < 1:
            raise ValueError(f'bits must be at least 1, got {bits=}')
        self.bits, self.signed = bits, signed
        self.alpha = nn.Parameter(torch.ones(1))
        self.register_buffer('started', torch.zeros((), dtype=torch.bool))

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        if not self.signed:
            return 0, 2**self.bits - 1
        return (-1, 1) if self.bits == 1 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.codes
        if self.training and not torch.compiler.is_compiling() and not self.started:
            with torch.no_grad():
                self.alpha.fill_((2 if self.signed else 4) * x.abs().mean() / math.sqrt(high))
                self.started.fill_(True)
        lowest = x.detach().amin() if not self.signed and self.bits > 1 else x.new_zeros(())
        return _Elastic.apply(x - lowest, self.alpha, low, high, self.signed and self.bits == 1) + lowest

    def extra_repr(self) -> str:
        return f'bits={self.bits}, signed={self.signed}'


def learns(x: Tensor) -> bool:
    """Whether a gradient of x will be asked for."""
    return torch.is_grad_enabled() and x.requires_grad


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * ((x > -1) & (x < 1))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low = low
        return (x > 0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * ((x > ctx.low) & (x < 1)), None


class _PowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shift: Tensor, signs: Tensor, lowest: int) -> Tensor:
        value = _power(shift, signs, lowest)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        return grad * value * math.log(2), grad, None


class _NearestPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lowest: int) -> Tensor:
        return _nearest(weight, lowest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, integer_bits: int, fraction_bits: int) -> Tensor:
        return round_down(x, integer_bits, fraction_bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class _Elastic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, low: int, high: int, one_bit: bool) -> Tensor:
        alpha = alpha.clamp(min=1e-5)
        ctx.save_for_backward(x, alpha)
        ctx.low, ctx.high, ctx.one_bit = low, high, one_bit
        return (x.sign() if one_bit else (x / alpha).round().clamp(low, high)) * alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, alpha = ctx.saved_tensors
        ratio = x / alpha
        inside = (ratio >= ctx.low) & (ratio <= ctx.high)
        code = x.sign() if ctx.one_bit else torch.where(inside, ratio.round() - ratio, ratio.clamp(ctx.low, ctx.high))
        return grad * inside, (code * grad).sum()[None] / math.sqrt(x.numel() * ctx.high), None, None, None


def _power(shift: Tensor, signs: Tensor, lowest: int) -> Tensor:
    return torch.exp2(shift.clamp(lowest, 0).round()) * signs.round().sign()


def _nearest(weight: Tensor, lowest: int) -> Tensor:
    shift, signs = split_power(weight.clamp(-1, 1))
    return torch.exp2(shift.clamp(min=lowest)) * signs
