"""Window attention in Triton, on the (B, H, W, 3C) map: no roll, no padded copy, no window is cut out in memory.

A program computes one window of one head. Place n of a window lies at row a * wh * d + (n // ww) * d + p of the shifted
padded map (window row a, phase p of the dilation d); adding the shift, modulo the padded height, and taking `pad` away
gives its row on the map. Keys off the map, or on the other side of a wrapped border, are masked; with `outside` the
former hold that row instead. Windows of at most 64 places are one block: their products, softmax and all gradients are
made from one reading of the map. Larger ones go block by block with a running softmax.

With s = factor * q . k + bias, p = softmax(s), g the gradient of the result, all sums in float32:

    dv = p^T g,  ds = p * (g v^T - sum over j of p * (g v^T)),  dq = factor * ds k,  dk = factor * ds^T q

and the gradient of the bias is the sum of ds over windows and images.

With `cosine`, q and k are first divided by their norms, and factor is cosine[head].
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .triton_launch import block, block_within, dot, launch, precision, unit_stride
from .triton_window_backward import (
    _backward_bias_kernel,
    _backward_keys_kernel,
    _backward_queries_kernel,
    _backward_whole_kernel,
)
from .triton_window_tiles import load, logits, normed, places


@triton.jit
def _forward_kernel(
    qkv,
    bias,
    outside,
    cosine,
    out,
    lse,
    scale,
    H,
    W,
    C,
    D,
    rows,
    cols,
    shift_h,
    shift_w,
    top,
    left,
    stride_b,
    stride_h,
    stride_w,
    heads,
    WH: tl.constexpr,
    WW: tl.constexpr,
    DILATION: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BIAS: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    N: tl.constexpr = WH * WW
    window_id = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    start_i, inside_i, label_i = places(
        i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
    )
    channel = head * D
    q = load(qkv, outside, channel, start_i, inside_i, i, d, D, N, OUTSIDE)
    factor = scale
    if COSINE:
        q, _q_inverse = normed(q, COSINE)
        factor = tl.load(cosine + head).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    most = tl.full([BLOCK], float('-inf'), tl.float32)
    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        start_j, inside_j, label_j = places(
            j, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
        )
        key, value = C + channel, 2 * C + channel
        k = load(qkv, outside, key, start_j, inside_j, j, d, D, N, OUTSIDE)
        v = load(qkv, outside, value, start_j, inside_j, j, d, D, N, OUTSIDE)
        if COSINE:
            k, _k_inverse = normed(k, COSINE)
        s, _products = logits(q, k, i, j, label_i, label_j, inside_j, bias, head, factor, N, OUTSIDE, BIAS, PRECISION)
        higher = tl.maximum(most, tl.max(s, 1))
        base = tl.where(higher == float('-inf'), 0.0, higher)  # nothing seen yet
        p = tl.exp(s - base[:, None])
        fade = tl.exp(most - base)
        total = total * fade + tl.sum(p, 1)
        result = result * fade[:, None] + dot(p.to(v.dtype), v, PRECISION)
        most = higher
    some = total > 0
    result = result / tl.where(some, total, 1.0)[:, None]
    start_o, _on_map, _label = places(
        i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, H * W * C, W * C, C, WH, WW, DILATION
    )
    mask = inside_i[:, None] & (d < D)[None, :]
    tl.store(out + channel + start_o[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)
    log_sum = tl.where(some, most + tl.log(tl.where(some, total, 1.0)), 0.0)
    tl.store(lse + (window_id.to(tl.int64) * heads + head) * N + i, log_sum, mask=i < N)


_CHUNKS = 512  # programs per head that sum up gradients of shared tensors, at most


class _Call:
    """The numbers of a call that its kernels take."""

    def __init__(
        self,
        qkv: Tensor,
        bias: Tensor | None,
        outside: Tensor | None,
        cosine: Tensor | None,
        window: Sequence[int],
        shift: Sequence[int],
        heads: int,
        scale: float,
        pad: Sequence[int],
        dilation: int,
    ) -> None:
        self.batch, H, W, C3 = qkv.shape
        C = C3 // 3
        (wh, ww), d = window, dilation
        self.heads, self.places, self.width = heads, wh * ww, C // heads
        rows = (H + pad[0] + wh * d - 1) // (wh * d)
        cols = (W + pad[1] + ww * d - 1) // (ww * d)
        self.windows = self.batch * rows * cols * d * d
        numbers = (scale, H, W, C, self.width, rows, cols, shift[0] * d, shift[1] * d, *pad)
        self.numbers = (*numbers, *qkv.stride()[:3], heads)
        self.block = block_within(self.places, self.width, qkv)
        self.blocks = (self.places + self.block - 1) // self.block
        self.constants: dict[str, Any] = {
            'WH': wh,
            'WW': ww,
            'DILATION': d,
            'OUTSIDE': outside is not None,
            'BIAS': bias is not None,
            'COSINE': cosine is not None,
            'PRECISION': precision(qkv),
            'BLOCK': self.block,
            'BLOCK_D': block(self.width, 128),
            'num_warps': 4,
            'num_stages': 1 if self.blocks == 1 else 2,
        }


@triton_op('densezoo::window_attention', mutates_args={})
def _forward(
    qkv: Tensor,
    bias: Tensor | None,
    outside: Tensor | None,
    cosine: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    heads: int,
    scale: float,
    pad: Sequence[int],
    dilation: int,
) -> tuple[Tensor, Tensor]:
    call = _Call(qkv, bias, outside, cosine, window, shift, heads, scale, pad, dilation)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    lse = qkv.new_empty((call.windows, heads, call.places), dtype=torch.float32)
    grid = (call.windows, heads, call.blocks)
    launch(_forward_kernel, grid, qkv, bias, outside, cosine, out, lse, *call.numbers, **call.constants)
    return out, lse


@triton_op('densezoo::window_attention_backward', mutates_args={})
def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    outside: Tensor | None,
    cosine: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    heads: int,
    scale: float,
    pad: Sequence[int],
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias, outside and cosine; of those that are None, nothing (0 elements)."""
    call = _Call(qkv, bias, outside, cosine, window, shift, heads, scale, pad, dilation)
    C, N = qkv.shape[3] // 3, call.places
    grad_qkv = qkv.new_empty(qkv.shape)
    shared = (qkv, bias, outside, cosine, lse, grad)

    def sums(present: bool, *shape: int) -> Tensor:
        """What each program adds to a shared gradient has a place of its own: no atomics, one order of adding."""
        return qkv.new_empty(shape if present else (0,), dtype=torch.float32)

    chunks = min(call.windows, max(2**24 // (heads * N * N), 1), _CHUNKS)
    each = (call.windows + chunks - 1) // chunks if chunks else 1
    grad_bias = sums(bias is not None, chunks, heads, N, N)
    parts = chunks if call.blocks == 1 else call.windows * call.blocks
    grad_outside = sums(outside is not None, parts, 2, C)
    grad_cosine = sums(cosine is not None, parts, heads)
    if call.blocks == 1:
        grads = (grad_qkv, grad_bias, grad_outside, grad_cosine)
        numbers = (*call.numbers, call.windows, each)
        launch(_backward_whole_kernel, (chunks, heads), *shared, *grads, *numbers, **call.constants)
    else:
        grid: tuple[int, ...] = (call.windows, heads, call.blocks)
        delta = torch.empty_like(lse)
        given = (*shared, out, delta, grad_qkv, grad_cosine)
        launch(_backward_queries_kernel, grid, *given, *call.numbers, **call.constants)
        targets = (grad_qkv, grad_outside)
        launch(_backward_keys_kernel, grid, *shared, delta, *targets, *call.numbers, **call.constants)
        if bias is not None:
            constants = {name: value for name, value in call.constants.items() if name != 'BIAS'}
            grid = (chunks, heads, call.blocks * call.blocks)
            numbers = (*call.numbers, call.windows, each)
            launch(_backward_bias_kernel, grid, *shared, delta, grad_bias, *numbers, **constants)
    if outside is not None:  # queries at padded places are not part of the result
        rows = grad_outside.sum(0).flatten()
        grad_outside = torch.cat((rows.new_zeros(C), rows)).to(outside.dtype)
    return (
        grad_qkv,
        grad_bias if bias is None else grad_bias.sum(0).to(bias.dtype),
        grad_outside,
        grad_cosine if cosine is None else grad_cosine.sum(0).to(cosine.dtype),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, outside, cosine, *ctx.options = inputs
    ctx.save_for_backward(qkv, bias, outside, cosine, *output)


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    qkv, bias, outside, cosine, out, lse = ctx.saved_tensors
    grads = _backward(grad.contiguous(), out, lse, qkv, bias, outside, cosine, *ctx.options)
    wanted = ctx.needs_input_grad
    given = (grad if need else None for grad, need in zip(grads, wanted, strict=False))
    return (*given, *(None for _ in ctx.options))


_forward.register_autograd(_gradients, setup_context=_keep)


def window_attention_triton(
    qkv: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    heads: int,
    bias: Tensor | None,
    scale: float,
    outside: Tensor | None,
    pad: tuple[int, int],
    dilation: int,
    cosine: Tensor | None,
) -> Tensor:
    """See `window_attention`."""
    bias, outside, cosine = (None if t is None else t.contiguous() for t in (bias, outside, cosine))
    options = (window, shift, heads, scale, pad, dilation)
    return _forward(unit_stride(qkv), bias, outside, cosine, *options)[0]
