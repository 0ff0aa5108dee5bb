"""Gradients of window attention in Triton; see `triton_window` for the formulas."""

import triton
import triton.language as tl

from .triton_launch import dot
from .triton_window_tiles import load, normed, places, unnormed, weights_and_slopes


@triton.jit
def _backward_whole_kernel(
    qkv,
    bias,
    outside,
    cosine,
    lse,
    grad,
    grad_qkv,
    grad_bias,
    grad_outside,
    grad_cosine,
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
    windows,
    each,
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
    """All gradients of some windows, each in one block; those of shared tensors are summed up and stored once."""
    N: tl.constexpr = WH * WW
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK)
    channel = head * D
    key, value = C + channel, 2 * C + channel
    factor = scale
    if COSINE:
        factor = tl.load(cosine + head).to(tl.float32)
    bias_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_D], tl.float32)
    cosine_sum = tl.zeros([BLOCK], tl.float32)
    for window_id in range(chunk * each, tl.minimum(chunk * each + each, windows)):
        start, inside, label = places(
            n, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
        )
        q = load(qkv, outside, channel, start, inside, n, d, D, N, OUTSIDE)
        k = load(qkv, outside, key, start, inside, n, d, D, N, OUTSIDE)
        v = load(qkv, outside, value, start, inside, n, d, D, N, OUTSIDE)
        q, q_inverse = normed(q, COSINE)
        k, k_inverse = normed(k, COSINE)
        dense, _on_map, _label = places(
            n, window_id, H, W, rows, cols, shift_h, shift_w, top, left, H * W * C, W * C, C, WH, WW, DILATION
        )
        g = load(grad, outside, channel, dense, inside, n, d, D, N, False)
        sums = tl.load(lse + (tl.cast(window_id, tl.int64) * heads + head) * N + n, mask=n < N, other=0.0)
        p, ds, products = weights_and_slopes(
            q,
            k,
            v,
            g,
            sums,
            sums,
            n,
            n,
            label,
            label,
            inside,
            inside,
            bias,
            head,
            factor,
            N,
            OUTSIDE,
            BIAS,
            PRECISION,
            True,
        )
        bias_sum += ds
        if COSINE:
            cosine_sum += tl.sum(ds * products, 1)
        narrow = ds.to(q.dtype)
        dq = dot(narrow, k, PRECISION) * factor
        dk = dot(tl.trans(narrow), q, PRECISION) * factor
        dv = dot(tl.trans(p.to(g.dtype)), g, PRECISION)
        dq = unnormed(dq, q, q_inverse, COSINE)
        dk = unnormed(dk, k, k_inverse, COSINE)
        mask = inside[:, None] & (d < D)[None, :]
        target = grad_qkv + 3 * dense[:, None] + d[None, :]
        tl.store(target + channel, dq.to(grad_qkv.dtype.element_ty), mask=mask)
        tl.store(target + key, dk.to(grad_qkv.dtype.element_ty), mask=mask)
        tl.store(target + value, dv.to(grad_qkv.dtype.element_ty), mask=mask)
        if OUTSIDE:
            padded = ((n < N) & (inside == 0))[:, None]
            key_sum += tl.sum(tl.where(padded, dk, 0.0), 0)
            value_sum += tl.sum(tl.where(padded, dv, 0.0), 0)
    if BIAS:
        both = (n < N)[:, None] & (n < N)[None, :]
        tl.store(
            grad_bias + (tl.cast(chunk, tl.int64) * heads + head) * N * N + n[:, None] * N + n[None, :],
            bias_sum,
            mask=both,
        )
    if OUTSIDE:
        row = grad_outside + chunk * 2 * C + channel + d
        tl.store(row, key_sum, mask=d < D)
        tl.store(row + C, value_sum, mask=d < D)
    if COSINE:
        tl.store(grad_cosine + chunk * heads + head, tl.sum(cosine_sum, 0))


@triton.jit
def _backward_queries_kernel(
    qkv,
    bias,
    outside,
    cosine,
    lse,
    grad,
    out,
    delta,
    grad_qkv,
    grad_cosine,
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
    """Gradients of one block of queries; also delta = g . out for the kernels that follow."""
    N: tl.constexpr = WH * WW
    window_id = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    channel = head * D
    key, value = C + channel, 2 * C + channel
    start_i, inside_i, label_i = places(
        i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
    )
    dense, _on_map, _label = places(
        i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, H * W * C, W * C, C, WH, WW, DILATION
    )
    q = load(qkv, outside, channel, start_i, inside_i, i, d, D, N, OUTSIDE)
    g = load(grad, outside, channel, dense, inside_i, i, d, D, N, False)
    o = load(out, outside, channel, dense, inside_i, i, d, D, N, False)
    sum_i = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    place = (window_id.to(tl.int64) * heads + head) * N + i
    tl.store(delta + place, sum_i, mask=i < N)
    lse_i = tl.load(lse + place, mask=i < N, other=0.0)
    factor = scale
    q, inverse = normed(q, COSINE)
    if COSINE:
        factor = tl.load(cosine + head).to(tl.float32)
    dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    cosine_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        start_j, inside_j, label_j = places(
            j, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
        )
        k = load(qkv, outside, key, start_j, inside_j, j, d, D, N, OUTSIDE)
        v = load(qkv, outside, value, start_j, inside_j, j, d, D, N, OUTSIDE)
        k, _k_inverse = normed(k, COSINE)
        _p, ds, products = weights_and_slopes(
            q,
            k,
            v,
            g,
            sum_i,
            lse_i,
            i,
            j,
            label_i,
            label_j,
            inside_i,
            inside_j,
            bias,
            head,
            factor,
            N,
            OUTSIDE,
            BIAS,
            PRECISION,
            False,
        )
        dq += dot(ds.to(k.dtype), k, PRECISION)
        if COSINE:
            cosine_sum += tl.sum(ds * products, 1)
    dq = unnormed(dq * factor, q, inverse, COSINE)
    mask = inside_i[:, None] & (d < D)[None, :]
    tl.store(grad_qkv + channel + 3 * dense[:, None] + d[None, :], dq.to(grad_qkv.dtype.element_ty), mask=mask)
    if COSINE:
        part = window_id.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        tl.store(grad_cosine + part * heads + head, tl.sum(cosine_sum, 0))


@triton.jit
def _backward_keys_kernel(
    qkv,
    bias,
    outside,
    cosine,
    lse,
    grad,
    delta,
    grad_qkv,
    grad_outside,
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
    """Gradients of one block of keys and values, and what of them belongs to the row `outside`."""
    N: tl.constexpr = WH * WW
    window_id = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    channel = head * D
    key, value = C + channel, 2 * C + channel
    start_j, inside_j, label_j = places(
        j, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
    )
    k = load(qkv, outside, key, start_j, inside_j, j, d, D, N, OUTSIDE)
    v = load(qkv, outside, value, start_j, inside_j, j, d, D, N, OUTSIDE)
    factor = scale
    k, inverse = normed(k, COSINE)
    if COSINE:
        factor = tl.load(cosine + head).to(tl.float32)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        start_i, inside_i, label_i = places(
            i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
        )
        dense, _on_map, _label = places(
            i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, H * W * C, W * C, C, WH, WW, DILATION
        )
        q = load(qkv, outside, channel, start_i, inside_i, i, d, D, N, OUTSIDE)
        g = load(grad, outside, channel, dense, inside_i, i, d, D, N, False)
        q, _q_inverse = normed(q, COSINE)
        place = (window_id.to(tl.int64) * heads + head) * N + i
        lse_i = tl.load(lse + place, mask=i < N, other=0.0)
        sum_i = tl.load(delta + place, mask=i < N, other=0.0)
        p, ds, _products = weights_and_slopes(
            q,
            k,
            v,
            g,
            sum_i,
            lse_i,
            i,
            j,
            label_i,
            label_j,
            inside_i,
            inside_j,
            bias,
            head,
            factor,
            N,
            OUTSIDE,
            BIAS,
            PRECISION,
            False,
        )
        dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
        dv += dot(tl.trans(p.to(g.dtype)), g, PRECISION)
    dk = unnormed(dk * factor, k, inverse, COSINE)
    dense_j, _on_map, _label = places(
        j, window_id, H, W, rows, cols, shift_h, shift_w, top, left, H * W * C, W * C, C, WH, WW, DILATION
    )
    mask = inside_j[:, None] & (d < D)[None, :]
    target = grad_qkv + 3 * dense_j[:, None] + d[None, :]
    tl.store(target + key, dk.to(grad_qkv.dtype.element_ty), mask=mask)
    tl.store(target + value, dv.to(grad_qkv.dtype.element_ty), mask=mask)
    if OUTSIDE:
        padded = ((j < N) & (inside_j == 0))[:, None]
        part = window_id.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        row = grad_outside + part * 2 * C + channel + d
        tl.store(row, tl.sum(tl.where(padded, dk, 0.0), 0), mask=d < D)
        tl.store(row + C, tl.sum(tl.where(padded, dv, 0.0), 0), mask=d < D)


@triton.jit
def _backward_bias_kernel(
    qkv,
    bias,
    outside,
    cosine,
    lse,
    grad,
    delta,
    grad_bias,
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
    windows,
    each,
    WH: tl.constexpr,
    WW: tl.constexpr,
    DILATION: tl.constexpr,
    OUTSIDE: tl.constexpr,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of one tile of the bias of one head, over some windows."""
    N: tl.constexpr = WH * WW
    BLOCKS: tl.constexpr = (WH * WW + BLOCK - 1) // BLOCK
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    i = tl.program_id(2) // BLOCKS * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(2) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    channel = head * D
    key, value = C + channel, 2 * C + channel
    factor = scale
    if COSINE:
        factor = tl.load(cosine + head).to(tl.float32)
    bias_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    for window_id in range(chunk * each, tl.minimum(chunk * each + each, windows)):
        start_i, inside_i, label_i = places(
            i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
        )
        start_j, inside_j, label_j = places(
            j, window_id, H, W, rows, cols, shift_h, shift_w, top, left, stride_b, stride_h, stride_w, WH, WW, DILATION
        )
        dense, _on_map, _label = places(
            i, window_id, H, W, rows, cols, shift_h, shift_w, top, left, H * W * C, W * C, C, WH, WW, DILATION
        )
        q = load(qkv, outside, channel, start_i, inside_i, i, d, D, N, OUTSIDE)
        k = load(qkv, outside, key, start_j, inside_j, j, d, D, N, OUTSIDE)
        v = load(qkv, outside, value, start_j, inside_j, j, d, D, N, OUTSIDE)
        g = load(grad, outside, channel, dense, inside_i, i, d, D, N, False)
        q, _q_inverse = normed(q, COSINE)
        k, _k_inverse = normed(k, COSINE)
        place = (tl.cast(window_id, tl.int64) * heads + head) * N + i
        lse_i = tl.load(lse + place, mask=i < N, other=0.0)
        sum_i = tl.load(delta + place, mask=i < N, other=0.0)
        _p, ds, _products = weights_and_slopes(
            q,
            k,
            v,
            g,
            sum_i,
            lse_i,
            i,
            j,
            label_i,
            label_j,
            inside_i,
            inside_j,
            bias,
            head,
            factor,
            N,
            OUTSIDE,
            True,
            PRECISION,
            False,
        )
        bias_sum += ds
    both = (i < N)[:, None] & (j < N)[None, :]
    tile = grad_bias + (tl.cast(chunk, tl.int64) * heads + head) * N * N + i[:, None] * N + j[None, :]
    tl.store(tile, bias_sum, mask=both)
