"""Merging of rows in Triton. With E(p) the moved rows that go to place p, k(p) the row that stays, s their shares:

    out[p] = x[k(p)] + sum over e in E(p) of s[e] * (x[e] - x[k(p)])

and of a gradient g of the result

    dx[e] = s[e] * g[p],   dx[k(p)] = (1 - sum over e in E(p) of s[e]) * g[p],   ds[e] = g[p] . (x[e] - x[k(p)]).

The moved rows come sorted by their places, so that a program makes one place: it reads its rows once, all channels at a
time, and writes its row once (backward, the rows that became it). Float32 sums in one order, no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .triton_launch import launch, unit_stride


@triton.jit
def _row(pointer, image, n, c, C, stride_b, stride_n):
    start = image.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n
    return tl.load(pointer + start + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _merge_kernel(x, share, kept, moved, ends, out, N, M, R, C, stride_b, stride_n, BLOCK_C: tl.constexpr):
    place, image = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    own = _row(x, image, tl.load(kept + image * M + place), c, C, stride_b, stride_n)
    total = own
    first = tl.load(ends + image * (M + 1) + place).to(tl.int32)
    last = tl.load(ends + image * (M + 1) + place + 1).to(tl.int32)
    for e in range(first, last):
        n = tl.load(moved + image * R + e)
        total += tl.load(share + image * N + n).to(tl.float32) * (_row(x, image, n, c, C, stride_b, stride_n) - own)
    goal = (image.to(tl.int64) * M + place) * C
    tl.store(out + goal + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def _backward_kernel(
    grad, x, share, kept, moved, ends, grad_x, grad_share, N, M, R, C, stride_b, stride_n, BLOCK_C: tl.constexpr
):
    place, image = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    g = _row(grad, image, place, c, C, M * C, C)
    k = tl.load(kept + image * M + place)
    own = _row(x, image, k, c, C, stride_b, stride_n)
    left = 1.0
    first = tl.load(ends + image * (M + 1) + place).to(tl.int32)
    last = tl.load(ends + image * (M + 1) + place + 1).to(tl.int32)
    for e in range(first, last):
        n = tl.load(moved + image * R + e)
        s = tl.load(share + image * N + n).to(tl.float32)
        left -= s
        goal = (image.to(tl.int64) * N + n) * C
        tl.store(grad_x + goal + c, (s * g).to(grad_x.dtype.element_ty), mask=c < C)
        slope = tl.sum(g * (_row(x, image, n, c, C, stride_b, stride_n) - own), 0)
        tl.store(grad_share + image * N + n, slope.to(grad_share.dtype.element_ty))
    goal = (image.to(tl.int64) * N + k) * C
    tl.store(grad_x + goal + c, (left * g).to(grad_x.dtype.element_ty), mask=c < C)


def _sizes(x: Tensor, kept: Tensor, moved: Tensor) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """The grid, the numbers and the constants of a call."""
    B, N, C = x.shape
    M, R = kept.shape[1], moved.shape[1]
    return (M, B), (N, M, R, C, *x.stride()[:2]), {'BLOCK_C': triton.next_power_of_2(C)}


@triton_op('densezoo::mean_to_places', mutates_args={})
def _forward(x: Tensor, share: Tensor, kept: Tensor, moved: Tensor, ends: Tensor) -> Tensor:
    grid, numbers, constants = _sizes(x, kept, moved)
    out = x.new_empty((*kept.shape, x.shape[2]))
    launch(_merge_kernel, grid, x, share, kept, moved, ends, out, *numbers, **constants)
    return out


@triton_op('densezoo::mean_to_places_backward', mutates_args={})
def _backward(
    grad: Tensor, x: Tensor, share: Tensor, kept: Tensor, moved: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    grid, numbers, constants = _sizes(x, kept, moved)
    grad_x, grad_share = x.new_empty(x.shape), share.new_zeros(share.shape)
    launch(_backward_kernel, grid, grad, x, share, kept, moved, ends, grad_x, grad_share, *numbers, **constants)
    return grad_x, grad_share


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad.contiguous(), *ctx.saved_tensors)
    given = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
    return (*given, None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def mean_to_places_triton(x: Tensor, share: Tensor, place: Tensor, kept: Tensor, moved: Tensor) -> Tensor:
    """See `mean_to_places`."""
    M = kept.shape[1]
    target, order = place.gather(1, moved).sort(dim=1, stable=True)
    # how many moved rows go to places before 0, 1, ..., M
    ends = torch.searchsorted(target, torch.arange(M + 1, device=x.device).expand(x.shape[0], -1).contiguous())
    moved = moved.gather(1, order)
    return _forward(unit_stride(x), share[..., 0].contiguous(), kept.contiguous(), moved, ends)
