"""Binary linear layers in Triton: XNOR and popcount on packed words, or packed weights against float inputs.

The first packs the input's signs (two planes of bits: positive, nonzero; words before rows, so that a warp reads
neighbouring rows) and counts with the GPU's popc: per word one xor, one and, one popc for 32 products. The second
unpacks a block of weights into registers and multiplies on tensor cores: what it saves is reading the weights, 1/16 of
half precision's bytes. Sums are int32, or float32; see `binary_linear` for the formula.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .bits import WORD, words_for
from .triton_launch import INTERPRETED, block, dot, launch, precision, unit_stride


@triton.jit
def _popcount(words):
    if INTERPRETED:  # the interpreter knows no assembly
        words = words - ((words >> 1) & 0x55555555)
        words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
        words = (words & 0x0F0F0F0F) + ((words >> 4) & 0x0F0F0F0F)
        words = words + (words >> 8)
        return (words + (words >> 16)) & 0x3F
    return tl.inline_asm_elementwise('popc.b32 $0, $1;', '=r,r', [words], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _pack_kernel(x, positive, nonzero, M, K, W, stride_m, BLOCK: tl.constexpr):
    """One word of a block of rows, its two planes."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.program_id(1)
    lane = tl.arange(0, 32)
    k = word * 32 + lane
    value = tl.load(
        x + m.to(tl.int64)[:, None] * stride_m + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
    ).to(tl.float32)
    goal = word.to(tl.int64) * M + m
    tl.store(positive + goal, tl.sum((value > 0).to(tl.int32) << lane[None, :], 1), mask=m < M)
    tl.store(nonzero + goal, tl.sum((value != 0).to(tl.int32) << lane[None, :], 1), mask=m < M)


@triton.jit
def _xnor_kernel(
    positive, nonzero, weight, present, scale, bias, out, M, N, W,
    TERNARY: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    both = tl.zeros([BLOCK, BLOCK_N], tl.int32)  # products that are not zero
    unequal = tl.zeros([BLOCK, BLOCK_N], tl.int32)
    for word in range(0, W):
        a = tl.load(positive + word * M + m, mask=m < M, other=0)
        valid = tl.load(nonzero + word * M + m, mask=m < M, other=0)[:, None]
        place = o.to(tl.int64) * W + word
        b = tl.load(weight + place, mask=o < N, other=0)
        if TERNARY:
            valid = valid & tl.load(present + place, mask=o < N, other=0)[None, :]
        both += _popcount(valid)
        unequal += _popcount((a[:, None] ^ b[None, :]) & valid)
    result = (both - 2 * unequal).to(tl.float32)
    _finish(result, scale, bias, out, m, o, M, N, SCALED, BIASED)


@triton.jit
def _float_kernel(
    x, weight, present, scale, bias, out, M, K, N, W, stride_m,
    TERNARY: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + m.to(tl.int64)[:, None] * stride_m + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
        )
        place = o.to(tl.int64)[None, :] * W + (k // 32)[:, None]
        inside = (k < K)[:, None] & (o < N)[None, :]
        signs = 2 * ((tl.load(weight + place, mask=inside, other=0) >> (k % 32)[:, None]) & 1) - 1
        if TERNARY:
            signs = signs * ((tl.load(present + place, mask=inside, other=0) >> (k % 32)[:, None]) & 1)
        total += dot(a, signs.to(tl.float32).to(a.dtype), PRECISION)
    _finish(total, scale, bias, out, m, o, M, N, SCALED, BIASED)


@triton.jit
def _finish(result, scale, bias, out, m, o, M, N, SCALED: tl.constexpr, BIASED: tl.constexpr):
    if SCALED:
        result = result * tl.load(scale + o, mask=o < N, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        result = result + tl.load(bias + o, mask=o < N, other=0.0).to(tl.float32)[None, :]
    goal = m.to(tl.int64)[:, None] * N + o[None, :]
    tl.store(out + goal, result.to(out.dtype.element_ty), mask=(m < M)[:, None] & (o < N)[None, :])


@triton_op('densezoo::binary_linear', mutates_args={})
def _binary(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, nonzero: Tensor | None, input_signs: bool
) -> Tensor:
    M, K = x.shape
    N, W = weight.shape
    out = x.new_empty((M, N))
    size, outputs = block(M, 32), block(N, 64)
    grid = ((M + size - 1) // size, (N + outputs - 1) // outputs)
    flags = {'TERNARY': nonzero is not None, 'SCALED': scale is not None, 'BIASED': bias is not None}
    blocks = {'BLOCK': size, 'BLOCK_N': outputs}
    # an absent tensor is never read: any other stands in its place
    present, factor, added = (weight if nonzero is None else nonzero, *(x if t is None else t for t in (scale, bias)))
    if input_signs:
        planes = weight.new_empty((2, W, M))
        launch(_pack_kernel, (triton.cdiv(M, 64), W), x, planes[0], planes[1], M, K, W, x.stride(0), BLOCK=64)
        launch(
            _xnor_kernel, grid, planes[0], planes[1], weight, present, factor, added, out, M, N, W, **flags, **blocks
        )
    else:
        numbers = (M, K, N, W, x.stride(0))
        constants = {**flags, 'PRECISION': precision(x), **blocks, 'BLOCK_K': WORD}
        launch(_float_kernel, grid, x, weight, present, factor, added, out, *numbers, **constants)
    return out


def binary_linear_triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    nonzero: Tensor | None,
    input_signs: bool,
) -> Tensor:
    """See `binary_linear`."""
    assert weight.shape[1] == words_for(x.shape[-1])
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    dense = [None if t is None else t.contiguous() for t in (weight, scale, bias, nonzero)]
    with torch.no_grad():
        out = _binary(rows, dense[0], dense[1], dense[2], dense[3], input_signs)
    return out.view(*x.shape[:-1], weight.shape[0])
