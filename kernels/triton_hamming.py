"""Binary attention in Triton: two passes over the keys of a block of queries, no map of N x M.

The first pass finds each row's largest logit, the second counts the values of the keys that reach it but for
ln(threshold). Signs are exact in half precision and their sums in float32; see `hamming_attention` for the formula.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .triton_launch import block, dot, launch, unit_stride


@triton.jit
def _signs(start, row, exists, stride, c, d):
    x = tl.load(
        start + row.to(tl.int64)[:, None] * stride + c[None, :], mask=exists[:, None] & (c < d)[None, :], other=0.0
    ).to(tl.float32)
    return ((x > 0).to(tl.float32) - (x < 0).to(tl.float32)).to(tl.float16)


@triton.jit
def _logits(
    q, key, bias, i, j, N, M, stride, bias_n, bias_m, c, d, scale, BIASED: tl.constexpr
):  # fmt: skip
    k = _signs(key, j, j < M, stride, c, d)
    logit = scale * dot(q, tl.trans(k), 'ieee')
    if BIASED:
        place = i.to(tl.int64)[:, None] * bias_n + j.to(tl.int64)[None, :] * bias_m
        logit += tl.load(bias + place, mask=(i < N)[:, None] & (j < M)[None, :], other=0.0).to(tl.float32)
    return tl.where((j < M)[None, :], logit, float('-inf'))


@triton.jit
def _attend_kernel(
    query, key, value, bias, out, N, M, d, heads, scale, drop,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, bias_b, bias_h, bias_n, bias_m,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    keys = key + batch * key_b + head * key_h
    values = value + batch * value_b + head * value_h
    added = bias + batch * bias_b + head * bias_h
    q = _signs(query + batch * query_b + head * query_h, i, i < N, query_n, c, d)
    lowest = tl.zeros([BLOCK], tl.float32)
    if SOFTMAX:
        lowest = tl.full([BLOCK], float('-inf'), tl.float32)
        for first in range(0, M, BLOCK):
            j = first + tl.arange(0, BLOCK)
            logit = _logits(q, keys, added, i, j, N, M, key_n, bias_n, bias_m, c, d, scale, BIASED)
            lowest = tl.maximum(lowest, tl.max(logit, 1))
        lowest -= drop
    total = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for first in range(0, M, BLOCK):
        j = first + tl.arange(0, BLOCK)
        logit = _logits(q, keys, added, i, j, N, M, key_n, bias_n, bias_m, c, d, scale, BIASED)
        chosen = logit >= lowest[:, None] if SOFTMAX else logit > lowest[:, None]
        chosen = chosen & (j < M)[None, :]
        total += dot(chosen.to(tl.float16), _signs(values, j, j < M, value_n, c, d), 'ieee')
    goal = (tl.program_id(0).to(tl.int64) * N + i)[:, None] * d + c[None, :]
    tl.store(out + goal, total.to(out.dtype.element_ty), mask=(i < N)[:, None] & (c < d)[None, :])


@triton_op('densezoo::hamming_attention', mutates_args={})
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, drop: float, softmax: bool
) -> Tensor:
    B, heads, N, d = query.shape
    M = key.shape[2]
    out = query.new_empty((B, heads, N, d))
    size = block(max(N, M), 64)
    added, strides = (query, (0, 0, 0, 0)) if bias is None else (bias, bias.stride())
    numbers = (N, M, d, heads, scale, drop, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides)
    constants = {'SOFTMAX': softmax, 'BIASED': bias is not None, 'BLOCK': size, 'BLOCK_C': block(d, 128)}
    launch(_attend_kernel, (B * heads, (N + size - 1) // size), query, key, value, added, out, *numbers, **constants)
    return out


def hamming_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, threshold: float | None, bias: Tensor | None
) -> Tensor:
    """See `hamming_attention`."""
    shape = query.shape
    if bias is not None:  # a view, unless it differs between windows but not between images
        bias = _four_axes(bias.expand(*shape[:-1], key.shape[-2]))
    query, key, value = (unit_stride(_four_axes(t)) for t in (query, key, value))
    drop = 0.0 if threshold is None else -math.log(threshold)
    with torch.no_grad():
        return _attend(query, key, value, bias, float(scale), drop, threshold is not None).view(shape)


def _four_axes(x: Tensor) -> Tensor:
    """All leading axes but the last, the heads, as one."""
    heads = x.shape[-3] if x.ndim > 2 else 1
    return x.reshape(-1, heads, *x.shape[-2:])
