"""The best partner of each token in Triton: products, norms and a running maximum, no matrix of similarities.

See `token_merge` for the formula. Float32 products; of equal similarities the first partner wins. There is nothing to
differentiate: the results are an order and indices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .triton_launch import block, dot, launch, precision, unit_stride


@triton.jit
def _unit(metric, position, exists, stride_n, c, C):
    x = tl.load(
        metric + position.to(tl.int64)[:, None] * stride_n + c[None, :],
        mask=exists[:, None] & (c < C)[None, :],
        other=0.0,
    ).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1))
    return x / tl.where(exists, length, 1.0)[:, None]


@triton.jit
def _match_kernel(
    metric, best, partner, A, B, C, stride_b, stride_n,
    CLASS: tl.constexpr, DISTILL: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    start = metric + tl.program_id(0).to(tl.int64) * stride_b
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    mine = _unit(start, 2 * i, i < A, stride_n, c, C)
    highest = tl.full([BLOCK], float('-inf'), tl.float32)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, B, BLOCK):
        j = first + tl.arange(0, BLOCK)
        theirs = _unit(start, 2 * j + 1, j < B, stride_n, c, C)
        scores = dot(mine, tl.trans(theirs), PRECISION)
        allowed = (j < B)[None, :] & (i >= 0)[:, None]
        if CLASS:
            allowed = allowed & (i > 0)[:, None]
        if DISTILL:
            allowed = allowed & (j > 0)[None, :]
        scores = tl.where(allowed, scores, float('-inf'))
        here = tl.max(scores, 1)
        number = tl.min(tl.where(scores == here[:, None], j[None, :], 2147483647), 1)
        better = here > highest
        highest = tl.where(better, here, highest)
        found = tl.where(better, number, found)
    place = tl.program_id(0).to(tl.int64) * A + i
    tl.store(best + place, highest, mask=i < A)
    tl.store(partner + place, found.to(tl.int64), mask=i < A)


@triton_op('densezoo::best_partners', mutates_args={})
def _best(metric: Tensor, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    batch, N, C = metric.shape
    A, B = (N + 1) // 2, N // 2
    best = metric.new_empty((batch, A), dtype=torch.float32)
    partner = metric.new_empty((batch, A), dtype=torch.int64)
    size = 32 if C > 128 else block(A)
    constants = {'CLASS': class_token, 'DISTILL': distill_token, 'PRECISION': precision(metric.float()), 'BLOCK': size}
    numbers = (A, B, C, *metric.stride()[:2])
    grid = (batch, (A + size - 1) // size)
    launch(_match_kernel, grid, metric, best, partner, *numbers, **constants, BLOCK_C=block(C, 256))
    return best, partner


def best_partners_triton(metric: Tensor, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    """See `best_partners`."""
    return _best(unit_stride(metric), class_token, distill_token)
