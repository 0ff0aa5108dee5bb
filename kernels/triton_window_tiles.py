"""The parts that the window-attention kernels share: where the places of a window lie, loads, norms, logits."""

import triton
import triton.language as tl

from .triton_launch import dot


@triton.jit
def places(
    n,
    window_id,
    H,
    W,
    rows,
    cols,
    shift_h,
    shift_w,
    top,
    left,
    stride_b,
    stride_h,
    stride_w,
    WH: tl.constexpr,
    WW: tl.constexpr,
    DILATION: tl.constexpr,
):
    """Of places n of a window: where they begin in memory, whether they are on the map, their label."""
    phase = window_id % (DILATION * DILATION)
    window = window_id // (DILATION * DILATION)
    row = (window // cols % rows) * WH * DILATION + phase // DILATION + n // WW * DILATION
    col = (window % cols) * WW * DILATION + phase % DILATION + n % WW * DILATION
    height = rows * WH * DILATION
    width = cols * WW * DILATION
    label = (row >= height - shift_h).to(tl.int32) * 2 + (col >= width - shift_w).to(tl.int32)
    row = (row + shift_h) % height - top
    col = (col + shift_w) % width - left
    inside = (n < WH * WW) & (row >= 0) & (row < H) & (col >= 0) & (col < W)
    image = window // (rows * cols)
    start = image.to(tl.int64) * stride_b + row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w
    return start, inside, label


@triton.jit
def load(pointer, outside, channel, start, inside, n, d, D, N: tl.constexpr, OUTSIDE: tl.constexpr):
    """Rows of the map; padded places hold `outside`, all else zeros."""
    x = tl.load(pointer + channel + start[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if OUTSIDE:
        row = tl.load(outside + channel + d, mask=d < D, other=0.0).to(x.dtype)
        x = tl.where(((n < N) & (inside == 0))[:, None], row[None, :], x)
    return x


@triton.jit
def normed(x, COSINE: tl.constexpr):
    """x divided by its norm (or by 1e-12), in its own type, and what it was multiplied by."""
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
    if COSINE:
        x = (wide * inverse[:, None]).to(x.dtype)
    return x, inverse


@triton.jit
def unnormed(gradient, normed, inverse, COSINE: tl.constexpr):
    """The gradient of x from that of x divided by its norm."""
    if COSINE:
        wide = normed.to(tl.float32)
        along = tl.sum(gradient * wide, 1) * (inverse < 1e12).to(tl.float32)
        gradient = (gradient - wide * along[:, None]) * inverse[:, None]
    return gradient


@triton.jit
def logits(
    q,
    k,
    i,
    j,
    label_i,
    label_j,
    inside_j,
    bias,
    head,
    factor,
    N: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scaled products with the bias; -inf where i does not see j. And the products themselves."""
    products = dot(q, tl.trans(k), PRECISION)
    s = products * factor
    if BIAS:
        both = (i < N)[:, None] & (j < N)[None, :]
        s += tl.load(bias + head * N * N + i[:, None] * N + j[None, :], mask=both, other=0.0).to(tl.float32)
    seen = (label_i[:, None] == label_j[None, :]) & (j < N)[None, :]
    if not OUTSIDE:
        seen = seen & inside_j[None, :]
    return tl.where(seen, s, float('-inf')), products


@triton.jit
def weights_and_slopes(
    q,
    k,
    v,
    g,
    delta,
    lse,
    i,
    j,
    label_i,
    label_j,
    inside_i,
    inside_j,
    bias,
    head,
    factor,
    N: tl.constexpr,
    OUTSIDE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """p, the gradient ds of the logits, and the products; rows of queries that are not stored are zero."""
    s, products = logits(q, k, i, j, label_i, label_j, inside_j, bias, head, factor, N, OUTSIDE, BIAS, PRECISION)
    p = tl.where(inside_i[:, None], tl.exp(s - lse[:, None]), 0.0)
    slope = dot(g, tl.trans(v), PRECISION)
    if WHOLE:
        delta = tl.sum(p * slope, 1)
    return p, p * (slope - delta[:, None]), products
