"""Neighborhood attention in Triton: a program makes a tile of queries of one phase of the dilation and one head.

The windows of a tile's queries lie in one rectangle of keys, whose rows go from the first query's start to the last
one's end; the rectangle is read in blocks, and each query masks what is not in its own window. Gradients of keys are
made the same way from the rectangle of the queries that may see a tile of keys: query n sees key m if
start(n) <= m < start(n) + w. See `neighborhood.py` for the formulas; float32 sums; the bias's gradient is added up
with atomics, in no fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .triton_launch import block, dot, launch, precision, unit_stride


@triton.jit
def _start(n, count, K: tl.constexpr):
    """The first neighbour of n, and how many it has."""
    width = tl.minimum(count, K)
    return tl.minimum(tl.maximum(n - K // 2, 0), count - width), width


@triton.jit
def _first_asking(m, count, K: tl.constexpr):
    """The first position that sees m; it is at most this."""
    return tl.where(m < K, 0, tl.minimum(m - (K - 1 - K // 2), tl.maximum(count - K + K // 2, 0)))


@triton.jit
def _last_asking(m, count, K: tl.constexpr):
    """The last position that sees m; it is at least this."""
    return tl.where(m >= count - K, count - 1, tl.minimum(m + K // 2, count - 1))


@triton.jit
def _load(pointer, row, col, exists, stride_h, stride_w, d, D):
    place = row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w
    return tl.load(pointer + place[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _logits(
    q, k, ny, nx, my, mx, rows, cols, exists_n, exists_m, bias, scale,
    KH: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(queries, keys): scaled products with the bias, -inf outside windows; and each pair's place in the bias."""
    top, height = _start(ny, rows, KH)
    left, width = _start(nx, cols, KW)
    seen = (my[None, :] >= top[:, None]) & (my[None, :] < (top + height)[:, None])
    seen = seen & (mx[None, :] >= left[:, None]) & (mx[None, :] < (left + width)[:, None])
    seen = seen & exists_n[:, None] & exists_m[None, :]
    s = dot(q, tl.trans(k), PRECISION) * scale
    place = (my[None, :] - ny[:, None] + KH - 1) * (2 * KW - 1) + mx[None, :] - nx[:, None] + KW - 1
    if BIAS:
        s += tl.load(bias + place, mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, s, float('-inf')), place, seen


@triton.jit
def _forward_kernel(
    qkv, bias, out, lse, scale, H, W, C, D, heads, tiles_w, stride_b, stride_h, stride_w,
    KH: tl.constexpr, KW: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    phase = tl.program_id(2)
    py, px = phase // EW, phase % EW
    rows, cols = (H - py + EH - 1) // EH, (W - px + EW - 1) // EW
    y0, x0 = tl.program_id(0) // tiles_w * TILE, tl.program_id(0) % tiles_w * TILE
    if (y0 < rows) & (x0 < cols):
        n = tl.arange(0, TILE * TILE)
        ny, nx = y0 + n // TILE, x0 + n % TILE
        exists_n = (ny < rows) & (nx < cols)
        d = tl.arange(0, BLOCK_D)
        source = qkv + image.to(tl.int64) * stride_b + head * D
        q = _load(source, py + EH * ny, px + EW * nx, exists_n, stride_h, stride_w, d, D)
        top, _height = _start(y0, rows, KH)
        left, _width = _start(x0, cols, KW)
        bottom, height = _start(tl.minimum(y0 + TILE, rows) - 1, rows, KH)
        right, width = _start(tl.minimum(x0 + TILE, cols) - 1, cols, KW)
        across = right + width - left
        total = tl.zeros([TILE * TILE], tl.float32)
        highest = tl.full([TILE * TILE], float('-inf'), tl.float32)
        result = tl.zeros([TILE * TILE, BLOCK_D], tl.float32)
        for first in range(0, (bottom + height - top) * across, BLOCK):
            m = first + tl.arange(0, BLOCK)
            my, mx = top + m // across, left + m % across
            exists_m = my < bottom + height
            k = _load(source + C, py + EH * my, px + EW * mx, exists_m, stride_h, stride_w, d, D)
            v = _load(source + 2 * C, py + EH * my, px + EW * mx, exists_m, stride_h, stride_w, d, D)
            own = bias + head * (2 * KH - 1) * (2 * KW - 1) if BIAS else bias
            s, _place, _seen = _logits(
                q, k, ny, nx, my, mx, rows, cols, exists_n, exists_m, own, scale, KH, KW, BIAS, PRECISION
            )
            higher = tl.maximum(highest, tl.max(s, 1))
            base = tl.where(higher == float('-inf'), 0.0, higher)
            p = tl.exp(s - base[:, None])
            fade = tl.exp(highest - base)
            total = total * fade + tl.sum(p, 1)
            result = result * fade[:, None] + dot(p.to(v.dtype), v, PRECISION)
            highest = higher
        total = tl.where(exists_n, total, 1.0)
        pixel = (image.to(tl.int64) * H + py + EH * ny) * W + px + EW * nx
        mask = exists_n[:, None] & (d < D)[None, :]
        goal = out + pixel[:, None] * C + head * D + d[None, :]
        tl.store(goal, (result / total[:, None]).to(out.dtype.element_ty), mask=mask)
        tl.store(lse + pixel * heads + head, highest + tl.log(total), mask=exists_n)


@triton.jit
def _backward_queries_kernel(
    qkv, bias, out, lse, grad, delta, grad_qkv, grad_bias, scale, H, W, C, D, heads, tiles_w,
    stride_b, stride_h, stride_w,
    KH: tl.constexpr, KW: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    phase = tl.program_id(2)
    py, px = phase // EW, phase % EW
    rows, cols = (H - py + EH - 1) // EH, (W - px + EW - 1) // EW
    y0, x0 = tl.program_id(0) // tiles_w * TILE, tl.program_id(0) % tiles_w * TILE
    if (y0 < rows) & (x0 < cols):
        n = tl.arange(0, TILE * TILE)
        ny, nx = y0 + n // TILE, x0 + n % TILE
        exists_n = (ny < rows) & (nx < cols)
        d = tl.arange(0, BLOCK_D)
        source = qkv + image.to(tl.int64) * stride_b + head * D
        q = _load(source, py + EH * ny, px + EW * nx, exists_n, stride_h, stride_w, d, D)
        pixel = (image.to(tl.int64) * H + py + EH * ny) * W + px + EW * nx
        mask = exists_n[:, None] & (d < D)[None, :]
        g = tl.load(grad + pixel[:, None] * C + head * D + d[None, :], mask=mask, other=0.0)
        o = tl.load(out + pixel[:, None] * C + head * D + d[None, :], mask=mask, other=0.0)
        sum_n = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + pixel * heads + head, sum_n, mask=exists_n)
        lse_n = tl.load(lse + pixel * heads + head, mask=exists_n, other=0.0)
        top, _height = _start(y0, rows, KH)
        left, _width = _start(x0, cols, KW)
        bottom, height = _start(tl.minimum(y0 + TILE, rows) - 1, rows, KH)
        right, width = _start(tl.minimum(x0 + TILE, cols) - 1, cols, KW)
        across = right + width - left
        dq = tl.zeros([TILE * TILE, BLOCK_D], tl.float32)
        table = head * (2 * KH - 1) * (2 * KW - 1)
        for first in range(0, (bottom + height - top) * across, BLOCK):
            m = first + tl.arange(0, BLOCK)
            my, mx = top + m // across, left + m % across
            exists_m = my < bottom + height
            k = _load(source + C, py + EH * my, px + EW * mx, exists_m, stride_h, stride_w, d, D)
            v = _load(source + 2 * C, py + EH * my, px + EW * mx, exists_m, stride_h, stride_w, d, D)
            own = bias + table if BIAS else bias
            s, place, seen = _logits(
                q, k, ny, nx, my, mx, rows, cols, exists_n, exists_m, own, scale, KH, KW, BIAS, PRECISION
            )
            ds = tl.exp(s - lse_n[:, None]) * (dot(g, tl.trans(v), PRECISION) - sum_n[:, None])
            if BIAS:
                tl.atomic_add(grad_bias + table + place, ds, mask=seen)
            dq += dot(ds.to(k.dtype), k, PRECISION)
        goal = grad_qkv + pixel[:, None] * 3 * C + head * D + d[None, :]
        tl.store(goal, (dq * scale).to(grad_qkv.dtype.element_ty), mask=mask)


@triton.jit
def _backward_keys_kernel(
    qkv, bias, lse, grad, delta, grad_qkv, scale, H, W, C, D, heads, tiles_w, stride_b, stride_h, stride_w,
    KH: tl.constexpr, KW: tl.constexpr, EH: tl.constexpr, EW: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    phase = tl.program_id(2)
    py, px = phase // EW, phase % EW
    rows, cols = (H - py + EH - 1) // EH, (W - px + EW - 1) // EW
    y0, x0 = tl.program_id(0) // tiles_w * TILE, tl.program_id(0) % tiles_w * TILE
    if (y0 < rows) & (x0 < cols):
        m = tl.arange(0, TILE * TILE)
        my, mx = y0 + m // TILE, x0 + m % TILE
        exists_m = (my < rows) & (mx < cols)
        d = tl.arange(0, BLOCK_D)
        source = qkv + image.to(tl.int64) * stride_b + head * D
        k = _load(source + C, py + EH * my, px + EW * mx, exists_m, stride_h, stride_w, d, D)
        v = _load(source + 2 * C, py + EH * my, px + EW * mx, exists_m, stride_h, stride_w, d, D)
        top, left = _first_asking(y0, rows, KH), _first_asking(x0, cols, KW)
        bottom = _last_asking(tl.minimum(y0 + TILE, rows) - 1, rows, KH) + 1
        across = _last_asking(tl.minimum(x0 + TILE, cols) - 1, cols, KW) + 1 - left
        dk = tl.zeros([TILE * TILE, BLOCK_D], tl.float32)
        dv = tl.zeros([TILE * TILE, BLOCK_D], tl.float32)
        for first in range(0, (bottom - top) * across, BLOCK):
            n = first + tl.arange(0, BLOCK)
            ny, nx = top + n // across, left + n % across
            exists_n = ny < bottom
            q = _load(source, py + EH * ny, px + EW * nx, exists_n, stride_h, stride_w, d, D)
            pixel = (image.to(tl.int64) * H + py + EH * ny) * W + px + EW * nx
            mask = exists_n[:, None] & (d < D)[None, :]
            g = tl.load(grad + pixel[:, None] * C + head * D + d[None, :], mask=mask, other=0.0)
            lse_n = tl.load(lse + pixel * heads + head, mask=exists_n, other=0.0)
            sum_n = tl.load(delta + pixel * heads + head, mask=exists_n, other=0.0)
            own = bias + head * (2 * KH - 1) * (2 * KW - 1) if BIAS else bias
            s, _place, _seen = _logits(
                q, k, ny, nx, my, mx, rows, cols, exists_n, exists_m, own, scale, KH, KW, BIAS, PRECISION
            )
            p = tl.exp(s - lse_n[:, None])
            ds = p * (dot(g, tl.trans(v), PRECISION) - sum_n[:, None])
            dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
            dv += dot(tl.trans(p.to(g.dtype)), g, PRECISION)
        pixel_m = (image.to(tl.int64) * H + py + EH * my) * W + px + EW * mx
        goal = grad_qkv + pixel_m[:, None] * 3 * C + head * D + d[None, :]
        mask_m = exists_m[:, None] & (d < D)[None, :]
        tl.store(goal + C, (dk * scale).to(grad_qkv.dtype.element_ty), mask=mask_m)
        tl.store(goal + 2 * C, dv.to(grad_qkv.dtype.element_ty), mask=mask_m)


def _call(
    qkv: Tensor, bias: Tensor | None, kernel: list[int], heads: int, dilation: list[int], scale: float
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Grid, numbers and constants of the kernels."""
    B, H, W, C3 = qkv.shape
    C = C3 // 3
    width = block(C // heads, 128)
    tile = 8 if width * qkv.element_size() <= 128 else 4
    tiles = [((n + e - 1) // e + tile - 1) // tile for n, e in zip((H, W), dilation, strict=True)]
    constants = {
        'KH': kernel[0],
        'KW': kernel[1],
        'EH': dilation[0],
        'EW': dilation[1],
        'BIAS': bias is not None,
        'PRECISION': precision(qkv),
        'TILE': tile,
        'BLOCK': tile * tile,
        'BLOCK_D': width,
        'num_warps': 4,
        'num_stages': 2,
    }
    grid = (tiles[0] * tiles[1], B * heads, dilation[0] * dilation[1])
    return grid, (scale, H, W, C, C // heads, heads, tiles[1], *qkv.stride()[:3]), constants


@triton_op('densezoo::neighborhood_attention', mutates_args={})
def _forward(
    qkv: Tensor, bias: Tensor | None, kernel: list[int], heads: int, dilation: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    grid, numbers, constants = _call(qkv, bias, kernel, heads, dilation, scale)
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    lse = qkv.new_empty((*qkv.shape[:3], heads), dtype=torch.float32)
    launch(_forward_kernel, grid, qkv, bias, out, lse, *numbers, **constants)
    return out, lse


@triton_op('densezoo::neighborhood_attention_backward', mutates_args={})
def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    heads: int,
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the bias (0 elements without one)."""
    grid, numbers, constants = _call(qkv, bias, kernel, heads, dilation, scale)
    grad_qkv, delta = qkv.new_empty(qkv.shape), torch.empty_like(lse)
    grad_bias = qkv.new_zeros((0,) if bias is None else bias.shape, dtype=torch.float32)
    given = (qkv, bias, out, lse, grad, delta, grad_qkv, grad_bias)
    launch(_backward_queries_kernel, grid, *given, *numbers, **constants)
    launch(_backward_keys_kernel, grid, qkv, bias, lse, grad, delta, grad_qkv, *numbers, **constants)
    return grad_qkv, grad_bias if bias is None else grad_bias.to(bias.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, *ctx.options = inputs
    ctx.save_for_backward(qkv, bias, *output)


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    qkv, bias, out, lse = ctx.saved_tensors
    grad_qkv, grad_bias = _backward(grad.contiguous(), out, lse, qkv, bias, *ctx.options)
    return grad_qkv, grad_bias if ctx.needs_input_grad[1] else None, *(None for _ in ctx.options)


_forward.register_autograd(_gradients, setup_context=_keep)


def neighborhood_attention_triton(
    qkv: Tensor,
    kernel: tuple[int, int],
    *,
    heads: int,
    dilation: tuple[int, int],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `neighborhood_attention`."""
    bias = None if bias is None else bias.contiguous()
    return _forward(unit_stride(qkv), bias, list(kernel), heads, list(dilation), scale)[0]
