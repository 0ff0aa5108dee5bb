"""Pooling mixer in Triton: y[b, i, j, c] = factor[b, c] * (mean over window(i, j) of x[b, u, v, c] - x[b, i, j, c]).

A normalisation over H, W and C jointly needs nothing else than factor: its mean and its bias are the same at every
position, so that they cancel between the mean over a window and the position itself, and

    factor[b, c] = weight[c] / sqrt(variance[b] + eps).

Gradients: of x, factor[b, c] * (sum over the windows (u, v) that hold (i, j) of g[u, v] / count(u, v) - g[i, j]), which
are those around (i, j); of factor, the sum over positions of g times the unscaled result. Float32 sums; x may have any
strides.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .triton_launch import launch


@triton.jit
def _pooled(x, i, j, exists, c, H, W, C, stride_h, stride_w, stride_c, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(positions, channels): the mean over each window minus the position, or the transposed operation."""
    channel = (c < C)[None, :]
    here = i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    own = tl.load(x + here[:, None] + c[None, :] * stride_c, mask=exists[:, None] & channel, other=0.0).to(tl.float32)
    rows = tl.minimum(i + R, H - 1) - tl.maximum(i - R, 0) + 1
    cols = tl.minimum(j + R, W - 1) - tl.maximum(j - R, 0) + 1
    total = tl.zeros(own.shape, tl.float32)
    for step in range(0, (2 * R + 1) * (2 * R + 1)):
        u = i + step // (2 * R + 1) - R
        v = j + step % (2 * R + 1) - R
        inside = exists & (u >= 0) & (u < H) & (v >= 0) & (v < W)
        there = u.to(tl.int64) * stride_h + v.to(tl.int64) * stride_w
        value = tl.load(x + there[:, None] + c[None, :] * stride_c, mask=inside[:, None] & channel, other=0.0)
        value = value.to(tl.float32)
        if TRANSPOSED:
            height = tl.minimum(u + R, H - 1) - tl.maximum(u - R, 0) + 1
            width = tl.minimum(v + R, W - 1) - tl.maximum(v - R, 0) + 1
            value = value / tl.where(inside, height * width, 1)[:, None].to(tl.float32)
        total += value
    if not TRANSPOSED:
        total = total / tl.where(exists, rows * cols, 1)[:, None].to(tl.float32)
    return total - own


@triton.jit
def _mix_kernel(
    x, factor, out, H, W, C, stride_b, stride_h, stride_w, stride_c,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    image = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = place < H * W
    start = x + image.to(tl.int64) * stride_b
    result = _pooled(start, place // W, place % W, exists, c, H, W, C, stride_h, stride_w, stride_c, R, TRANSPOSED)
    if SCALED:
        result = result * tl.load(factor + image * C + c, mask=c < C, other=0.0)[None, :]
    goal = (image.to(tl.int64) * H * W + place)[:, None] * C + c[None, :]
    tl.store(out + goal, result.to(out.dtype.element_ty), mask=exists[:, None] & (c < C)[None, :])


@triton.jit
def _factor_kernel(
    x, grad, sums, H, W, C, chunks, each, stride_b, stride_h, stride_w, stride_c,
    R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """sum over some positions of grad times the unscaled result."""
    image, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = x + image.to(tl.int64) * stride_b
    total = tl.zeros([BLOCK_C], tl.float32)
    for step in range(0, each):
        place = (chunk * each + step) * BLOCK + tl.arange(0, BLOCK)
        exists = place < H * W
        value = _pooled(start, place // W, place % W, exists, c, H, W, C, stride_h, stride_w, stride_c, R, False)
        where = (image.to(tl.int64) * H * W + place)[:, None] * C + c[None, :]
        g = tl.load(grad + where, mask=exists[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(g * value, 0)
    tl.store(sums + (image * chunks + chunk) * C + c, total, mask=c < C)


def _blocks(C: int) -> tuple[int, int]:
    channels = min(triton.next_power_of_2(C), 128)
    return max(2048 // channels, 16), channels


def _mix(x: Tensor, factor: Tensor | None, radius: int, transposed: bool) -> Tensor:
    B, H, W, C = x.shape
    out = x.new_empty((B, H, W, C))
    size, channels = _blocks(C)
    grid = (B, (H * W + size - 1) // size, (C + channels - 1) // channels)
    constants = {'R': radius, 'TRANSPOSED': transposed, 'SCALED': factor is not None, 'BLOCK': size}
    launch(_mix_kernel, grid, x, factor, out, H, W, C, *x.stride(), **constants, BLOCK_C=channels)
    return out


@triton_op('densezoo::pool_mixer', mutates_args={})
def _forward(x: Tensor, factor: Tensor | None, radius: int) -> Tensor:
    return _mix(x, factor, radius, False)


@triton_op('densezoo::pool_mixer_backward', mutates_args={})
def _backward(grad: Tensor, x: Tensor, factor: Tensor | None, radius: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and of factor (0 elements without one)."""
    grad_x = _mix(grad, factor, radius, True)
    if factor is None:
        return grad_x, grad.new_empty((0,), dtype=torch.float32)
    B, H, W, C = x.shape
    size, channels = _blocks(C)
    blocks = (H * W + size - 1) // size
    each = (blocks + 15) // 16
    chunks = (blocks + each - 1) // each
    sums = x.new_empty((B, chunks, C), dtype=torch.float32)
    grid = (B, chunks, (C + channels - 1) // channels)
    constants = {'R': radius, 'BLOCK': size, 'BLOCK_C': channels}
    launch(_factor_kernel, grid, x, grad, sums, H, W, C, chunks, each, *x.stride(), **constants)
    return grad_x, sums.sum(1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, factor, ctx.radius = inputs
    ctx.save_for_backward(x, factor)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, grad_factor = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.radius)
    return grad_x, grad_factor if ctx.needs_input_grad[1] else None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def pool_mixer_triton(x: Tensor, pool_size: int, *, norm: tuple[Tensor, Tensor | None, float] | None) -> Tensor:
    """See `pool_mixer`."""
    if norm is None:
        return _forward(x, None, pool_size // 2)
    weight, _, eps = norm
    variance = x.float().var((1, 2, 3), correction=0)
    factor = weight.float() * (variance + eps).rsqrt()[:, None]
    return _forward(x, factor, pool_size // 2)
