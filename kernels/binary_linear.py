"""Linear layers of binary weights, packed 32 to a word; of binary inputs too, as XNOR and popcount.

With s(x) = sign(x), s(0) = 0, and weights s[o, i] in {-1, 1} (or {-1, 0, 1}):

    out[m, o] = scale[o] * sum over i of s(x[m, i]) * s[o, i] + bias[o]          (input_signs=True)
    out[m, o] = scale[o] * sum over i of x[m, i] * s[o, i] + bias[o]             (input_signs=False)

For words a of the input's signs, b of the weights' and v of the positions where both are nonzero, the first sum is

    sum over words of popcount(v) - 2 popcount((a xor b) and v).

Layout: x (..., K); weight (N, ceil(K / 32)) int32, see `bits`; scale, bias (N,); out (..., N). Any K >= 1: the bits
that pad the last word have no counterpart in v.

Which form is fast is a question of the machine (figures: kernels/BENCHMARKS.md). On a CPU PyTorch has no popcount; its
int8 product has dot-product instructions, and unpacking the weights by a table costs a tenth of the product: that is
the path taken there, exact as the popcount is. A GPU takes the Triton kernels.
Source: XNOR-Net, arXiv 1603.05279; BiViT, arXiv 2211.07091.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import unpack_signs, words_for
from .dispatch import exporting, refuse_triton, select


def binary_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    nonzero: Tensor | None = None,
    input_signs: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A linear layer whose weights are signs, packed. For inference: of signs there is no gradient.

    Args:
        x: (..., K) floating point.
        weight: (N, ceil(K / 32)) int32, from `pack_bits(w > 0)`.
        scale: (N,) of each output; 1 if None.
        bias: (N,), or None.
        nonzero: (N, ceil(K / 32)) int32, from `pack_bits(w != 0)`; None: no weight is zero.
        input_signs: whether the signs of x are taken; otherwise x itself.
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        (..., N) of the type of x.

    Raises:
        ValueError: a shape or type does not fit, or the backend asked for cannot take the call.
    """
    _check(x, weight, scale, bias, nonzero)
    refusals = {'triton': can_run_triton(x, scale, bias), 'torch': None}
    if select('binary_linear', backend, refusals) == 'triton':
        from .triton_binary import binary_linear_triton  # Triton is imported where it is used

        return binary_linear_triton(x, weight, scale, bias, nonzero=nonzero, input_signs=input_signs)
    if (
        input_signs and x.device.type == 'cpu' and x.shape[-1] > 1 and not exporting()
    ):  # torch 2.14's int8: not for K = 1
        return _by_int8(x, weight, scale, bias, nonzero)
    return binary_linear_reference(x, weight, scale, bias, nonzero=nonzero, input_signs=input_signs)


def binary_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    nonzero: Tensor | None = None,
    input_signs: bool = True,
) -> Tensor:
    """The definition in plain PyTorch: the signs as numbers of the type of x, one matrix product."""
    signs = _signs(weight, nonzero, x.shape[-1], x.dtype)
    out = F.linear(x.sign() if input_signs else x, signs)
    out = out if scale is None else out * scale
    return (out if bias is None else out + bias).to(x.dtype)


def can_run_triton(x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> str | None:
    """Why Triton cannot take this call."""
    if x.requires_grad and torch.is_grad_enabled():
        return 'x asks for a gradient, and the kernel is for inference alone'
    return refuse_triton({'x': x, 'scale': scale, 'bias': bias})


def _by_int8(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, nonzero: Tensor | None) -> Tensor:
    """Integers throughout: exact, and four times the speed of a float32 product where the CPU has VNNI."""
    signs = _signs(weight, nonzero, x.shape[-1], torch.int8)
    rows = x.sign().to(torch.int8).flatten(0, -2) if x.ndim > 1 else x.sign().to(torch.int8)[None]
    sums = torch._int_mm(rows, signs.t()) if len(rows) else rows.new_empty(0, len(signs))
    out = sums.float()
    if scale is not None:
        out.mul_(scale)  # in place: each pass over the outputs costs a tenth of the product
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype).view(*x.shape[:-1], len(signs))


def _signs(weight: Tensor, nonzero: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    signs = unpack_signs(weight, width, dtype)
    return signs if nonzero is None else signs * (unpack_signs(nonzero, width, dtype) > 0)


def _check(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, nonzero: Tensor | None) -> None:
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f'x must be floating point (..., K), got {x.dtype=}, {tuple(x.shape)=}')
    if weight.ndim != 2 or weight.dtype != torch.int32 or weight.shape[1] != words_for(x.shape[-1]):
        raise ValueError(
            f'weight must be int32 (N, {words_for(x.shape[-1])}) for {x.shape[-1]} inputs packed 32 to a word, '
            f'got {weight.dtype=}, {tuple(weight.shape)=}; see pack_bits'
        )
    for name, vector in (('scale', scale), ('bias', bias)):
        if vector is not None and tuple(vector.shape) != (len(weight),):
            raise ValueError(f'{name} must be ({len(weight)},), one per output, got {tuple(vector.shape)}')
    if nonzero is not None and (nonzero.shape != weight.shape or nonzero.dtype != torch.int32):
        raise ValueError(f'nonzero must be int32 {tuple(weight.shape)} as weight, got {tuple(nonzero.shape)=}')
