"""Linear layers of signed powers of two in Triton: see `shift_linear` for the formula and the layout of the codes.

A block of codes becomes floats by writing their exponents, (127 - depth) << 23 with the sign in the highest bit: no
table, no multiplication; a sum of two powers is two of them, added. The products are a tensor core's, with float32
sums: a GPU has no faster shift. What the codes save is reading the weights: 5 bits instead of 16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .shift_linear import PER_WORD
from .triton_launch import block, dot, launch, precision, unit_stride


@triton.jit
def _fixed(x, STEPS: tl.constexpr, BOUND: tl.constexpr):
    return tl.minimum(tl.maximum(tl.floor(x * STEPS) / STEPS, -BOUND), BOUND - 1)


@triton.jit
def _shift_kernel(
    x, weight, bias, out, M, K, N, W, stride_m,
    STEPS: tl.constexpr, BOUND: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr, TERMS: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + m.to(tl.int64)[:, None] * stride_m + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
        )
        a = _fixed(a.to(tl.float32), STEPS, BOUND).to(a.dtype)
        place = o.to(tl.int64)[None, :] * W + (k // PER)[:, None]
        word = tl.load(weight + place, mask=(k < K)[:, None] & (o < N)[None, :], other=0)
        lane = k % PER
        bit = lane * 8 if BITS == 8 else lane * 5 + lane // 3  # three codes of five bits in each half
        code = (word >> bit[:, None]) & ((1 << BITS) - 1)
        if TERMS == 2:
            i, j = (code >> 2) & 3, code & 3  # 4 ** (1 - i) and 4 ** (1 - j) / 2, none for 0
            first = tl.where(i == 0, 0.0, ((129 - 2 * i) << 23).to(tl.float32, bitcast=True))
            second = tl.where(j == 0, 0.0, ((128 - 2 * j) << 23).to(tl.float32, bitcast=True))
            power = tl.where(code > 15, -(first + second), first + second)
        else:
            number = code - 1
            exponent = 127 - (number >> 1)
            pattern = (exponent << 23) | ((number & 1) << 31)
            power = tl.where(code == 0, 0.0, pattern.to(tl.float32, bitcast=True))
        total += dot(a, power.to(a.dtype), PRECISION)
    if BIASED:
        total += _fixed(tl.load(bias + o, mask=o < N, other=0.0).to(tl.float32), STEPS, BOUND)[None, :]
    goal = m.to(tl.int64)[:, None] * N + o[None, :]
    tl.store(out + goal, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (o < N)[None, :])


@triton_op('densezoo::shift_linear', mutates_args={})
def _shift(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, terms: int, integer_bits: int, fraction_bits: int
) -> Tensor:
    M, K = x.shape
    N, W = weight.shape
    out = x.new_empty((M, N))
    size, outputs = block(M, 32), block(N, 64)
    constants: dict[str, Any] = {
        'BITS': bits,
        'PER': PER_WORD[bits],
        'TERMS': terms,
        'BIASED': bias is not None,
        'PRECISION': precision(x),
    }
    constants |= {'STEPS': 2.0**fraction_bits, 'BOUND': 2.0 ** (integer_bits - 1)}
    grid = ((M + size - 1) // size, (N + outputs - 1) // outputs)
    tensors = (x, weight, x if bias is None else bias, out)  # an absent bias is never read
    launch(_shift_kernel, grid, *tensors, M, K, N, W, x.stride(0), **constants, BLOCK=size, BLOCK_N=outputs, BLOCK_K=32)
    return out


def shift_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, bits: int, terms: int, fixed: tuple[int, int]
) -> Tensor:
    """See `shift_linear`."""
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    with torch.no_grad():
        out = _shift(rows, weight.contiguous(), None if bias is None else bias.contiguous(), bits, terms, *fixed)
    return out.view(*x.shape[:-1], weight.shape[0])
