"""Attention between ranges of tokens, or between listed blocks of tokens, in Triton: what sparse windows, block-sparse
attention and attention to a pooled map have in common.

Queries come in groups: group w has the entries offsets_q[w] to below offsets_q[w + 1]. It sees the entries of group w
of the keys, or, where lists are given, the blocks of keys that its list names. Entry e is row index[e] of the tensor,
or row e itself; its result goes to row write[e], and nowhere if that is -1. A program makes BLOCK entries of one group
and one head, with a running softmax in float32; groups shorter than the longest one end their programs at once.

q, k, v: (B, T, h, d), any strides with a dense last axis; entries, lists and offsets are integers on the same device.
The gradient of keys is made per entry and added up for rows that are in several groups; the gradient of the bias is
added up with atomics (in no fixed order).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .triton_launch import block, block_within, dot, launch, precision, unit_stride


@triton.jit
def _steps(offsets, list_of, counts, w, group, most, BLOCK: tl.constexpr, LISTED: tl.constexpr, UNIT: tl.constexpr):
    """How many blocks of the other side group w sees."""
    if LISTED:
        return tl.load(counts + group).to(tl.int32) * (UNIT // BLOCK)
    else:
        return ((tl.load(offsets + w + 1) - tl.load(offsets + w) + BLOCK - 1) // BLOCK).to(tl.int32)


@triton.jit
def _range(
    step, offsets, list_of, w, group, most, length, BLOCK: tl.constexpr, LISTED: tl.constexpr, UNIT: tl.constexpr
):
    """The entries of one of those blocks, and which of them exist."""
    if LISTED:
        number = tl.load(list_of + group * most + step // (UNIT // BLOCK)).to(tl.int64)
        start = number * UNIT + step % (UNIT // BLOCK) * BLOCK
        end = tl.minimum(number * UNIT + UNIT, length)
    else:
        start = tl.load(offsets + w) + step * BLOCK
        end = tl.load(offsets + w + 1)
    entry = start + tl.arange(0, BLOCK)
    return entry, entry < end


@triton.jit
def _rows(index, entry, exists, INDEXED: tl.constexpr):
    """The rows of entries; -1 for those without."""
    if INDEXED:
        return tl.load(index + entry, mask=exists, other=-1)
    else:
        return tl.where(exists, entry, -1)


@triton.jit
def _load(pointer, row, stride, d, D):
    mask = (row >= 0)[:, None] & (d < D)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(q, k, scale, exists_k, bias, place_q, place_k, N, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    s = dot(q, tl.trans(k), PRECISION) * scale
    if BIAS:
        both = (place_q >= 0)[:, None] & (place_k >= 0)[None, :]
        s += tl.load(bias + place_q[:, None] * N + place_k[None, :], mask=both, other=0.0).to(tl.float32)
    return tl.where(exists_k[None, :], s, float('-inf'))


@triton.jit
def _forward_kernel(
    q, k, v, bias, place_q, place_k, index_q, index_k, write, offsets_q, offsets_k, list_k, counts_k, out, lse,
    scale, heads, D, N, groups, most, entries, rows_out, length_k,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    BIAS: tl.constexpr, INDEXED_Q: tl.constexpr, INDEXED_K: tl.constexpr, LISTED: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    w, part = tl.program_id(0), tl.program_id(1)
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first = tl.load(offsets_q + w) + part * BLOCK
    last = tl.load(offsets_q + w + 1)
    if first < last:
        d = tl.arange(0, BLOCK_D)
        i = first + tl.arange(0, BLOCK)
        exists_i = i < last
        row_i = _rows(index_q, i, exists_i, INDEXED_Q)
        x_q = _load(q + image.to(tl.int64) * q_b + head * q_h, row_i, q_t, d, D)
        places_i = _rows(place_q, i, exists_i, BIAS)
        group = (image * heads + head) * groups + w
        total = tl.zeros([BLOCK], tl.float32)
        highest = tl.full([BLOCK], float('-inf'), tl.float32)
        result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for step in range(0, _steps(offsets_k, list_k, counts_k, w, group, most, BLOCK, LISTED, UNIT)):
            j, exists_j = _range(step, offsets_k, list_k, w, group, most, length_k, BLOCK, LISTED, UNIT)
            row_j = _rows(index_k, j, exists_j, INDEXED_K)
            x_k = _load(k + image.to(tl.int64) * k_b + head * k_h, row_j, k_t, d, D)
            x_v = _load(v + image.to(tl.int64) * v_b + head * v_h, row_j, v_t, d, D)
            places_j = _rows(place_k, j, exists_j, BIAS)
            s = _logits(
                x_q, x_k, scale, exists_j, bias + head * N * N if BIAS else bias, places_i, places_j, N, BIAS, PRECISION
            )
            higher = tl.maximum(highest, tl.max(s, 1))
            base = tl.where(higher == float('-inf'), 0.0, higher)
            p = tl.exp(s - base[:, None])
            fade = tl.exp(highest - base)
            total = total * fade + tl.sum(p, 1)
            result = result * fade[:, None] + dot(p.to(x_v.dtype), x_v, PRECISION)
            highest = higher
        some = total > 0
        safe = tl.where(some, total, 1.0)
        target = _rows(write, i, exists_i, INDEXED_Q)
        place = (image.to(tl.int64) * rows_out + target.to(tl.int64)) * heads + head
        mask = (target >= 0)[:, None] & (d < D)[None, :]
        tl.store(out + place[:, None] * D + d[None, :], (result / safe[:, None]).to(out.dtype.element_ty), mask=mask)
        log_sum = tl.where(some, highest + tl.log(safe), 0.0)
        tl.store(lse + (image * heads + head).to(tl.int64) * entries + i, log_sum, mask=exists_i)


@triton.jit
def _backward_queries_kernel(
    q, k, v, bias, place_q, place_k, index_q, index_k, write, offsets_q, offsets_k, list_k, counts_k, out, lse, grad,
    delta, grad_q, grad_bias,
    scale, heads, D, N, groups, most, entries, rows_out, length_k,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    BIAS: tl.constexpr, INDEXED_Q: tl.constexpr, INDEXED_K: tl.constexpr, LISTED: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    w, part = tl.program_id(0), tl.program_id(1)
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first = tl.load(offsets_q + w) + part * BLOCK
    last = tl.load(offsets_q + w + 1)
    if first < last:
        d = tl.arange(0, BLOCK_D)
        i = first + tl.arange(0, BLOCK)
        exists_i = i < last
        row_i = _rows(index_q, i, exists_i, INDEXED_Q)
        x_q = _load(q + image.to(tl.int64) * q_b + head * q_h, row_i, q_t, d, D)
        places_i = _rows(place_q, i, exists_i, BIAS)
        target = _rows(write, i, exists_i, INDEXED_Q)
        offset = (image.to(tl.int64) * rows_out * heads + head) * D
        g = _load(grad + offset, target, heads * D, d, D)
        o = _load(out + offset, target, heads * D, d, D)
        sum_i = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        place = (image * heads + head).to(tl.int64) * entries + i
        lse_i = tl.load(lse + place, mask=exists_i, other=0.0)
        tl.store(delta + place, sum_i, mask=exists_i)
        group = (image * heads + head) * groups + w
        dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for step in range(0, _steps(offsets_k, list_k, counts_k, w, group, most, BLOCK, LISTED, UNIT)):
            j, exists_j = _range(step, offsets_k, list_k, w, group, most, length_k, BLOCK, LISTED, UNIT)
            row_j = _rows(index_k, j, exists_j, INDEXED_K)
            x_k = _load(k + image.to(tl.int64) * k_b + head * k_h, row_j, k_t, d, D)
            x_v = _load(v + image.to(tl.int64) * v_b + head * v_h, row_j, v_t, d, D)
            places_j = _rows(place_k, j, exists_j, BIAS)
            s = _logits(
                x_q, x_k, scale, exists_j, bias + head * N * N if BIAS else bias, places_i, places_j, N, BIAS, PRECISION
            )
            p = tl.where((target >= 0)[:, None], tl.exp(s - lse_i[:, None]), 0.0)
            ds = p * (dot(g, tl.trans(x_v), PRECISION) - sum_i[:, None])
            if BIAS:
                both = (target >= 0)[:, None] & exists_j[None, :]
                where = grad_bias + head * N * N + places_i[:, None] * N + places_j[None, :]
                tl.atomic_add(where, ds, mask=both)
            dq += dot(ds.to(x_k.dtype), x_k, PRECISION)
        mask = (target >= 0)[:, None] & (d < D)[None, :]
        goal = grad_q + offset + target.to(tl.int64)[:, None] * (heads * D) + d[None, :]
        tl.store(goal, (dq * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit
def _backward_keys_kernel(
    q, k, v, bias, place_q, place_k, index_q, index_k, write, offsets_q, offsets_k, list_q, counts_q, lse, grad, delta,
    grad_k, grad_v,
    scale, heads, D, N, groups, most, entries, rows_out, length_q, entries_k,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    BIAS: tl.constexpr, INDEXED_Q: tl.constexpr, INDEXED_K: tl.constexpr, LISTED: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """As the one of queries with the sides exchanged; the gradients are those of entries, not of rows."""
    w, part = tl.program_id(0), tl.program_id(1)
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first = tl.load(offsets_k + w) + part * BLOCK
    last = tl.load(offsets_k + w + 1)
    if first < last:
        d = tl.arange(0, BLOCK_D)
        j = first + tl.arange(0, BLOCK)
        exists_j = j < last
        row_j = _rows(index_k, j, exists_j, INDEXED_K)
        x_k = _load(k + image.to(tl.int64) * k_b + head * k_h, row_j, k_t, d, D)
        x_v = _load(v + image.to(tl.int64) * v_b + head * v_h, row_j, v_t, d, D)
        places_j = _rows(place_k, j, exists_j, BIAS)
        group = (image * heads + head) * groups + w
        offset = (image.to(tl.int64) * rows_out * heads + head) * D
        dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for step in range(0, _steps(offsets_q, list_q, counts_q, w, group, most, BLOCK, LISTED, UNIT)):
            i, exists_i = _range(step, offsets_q, list_q, w, group, most, length_q, BLOCK, LISTED, UNIT)
            row_i = _rows(index_q, i, exists_i, INDEXED_Q)
            target = _rows(write, i, exists_i, INDEXED_Q)
            x_q = _load(q + image.to(tl.int64) * q_b + head * q_h, row_i, q_t, d, D)
            g = _load(grad + offset, target, heads * D, d, D)
            places_i = _rows(place_q, i, exists_i, BIAS)
            place = (image * heads + head).to(tl.int64) * entries + i
            lse_i = tl.load(lse + place, mask=exists_i, other=0.0)
            sum_i = tl.load(delta + place, mask=exists_i, other=0.0)
            s = _logits(
                x_q, x_k, scale, exists_j, bias + head * N * N if BIAS else bias, places_i, places_j, N, BIAS, PRECISION
            )
            p = tl.where((target >= 0)[:, None], tl.exp(s - lse_i[:, None]), 0.0)
            ds = p * (dot(g, tl.trans(x_v), PRECISION) - sum_i[:, None])
            dk += dot(tl.trans(ds.to(x_q.dtype)), x_q, PRECISION)
            dv += dot(tl.trans(p.to(g.dtype)), g, PRECISION)
        mask = exists_j[:, None] & (d < D)[None, :]
        goal = ((image.to(tl.int64) * entries_k + j) * heads + head)[:, None] * D + d[None, :]
        tl.store(grad_k + goal, (dk * scale).to(grad_k.dtype.element_ty), mask=mask)
        tl.store(grad_v + goal, dv.to(grad_v.dtype.element_ty), mask=mask)


def _constants(
    q: Tensor, bias: Any, index_q: Any, index_k: Any, listed: Any, unit: int, longest: int
) -> dict[str, Any]:
    size = block_within(unit if listed is not None else longest, q.shape[3], q)
    return {
        'BIAS': bias is not None,
        'INDEXED_Q': index_q is not None,
        'INDEXED_K': index_k is not None,
        'LISTED': listed is not None,
        'UNIT': unit,
        'PRECISION': precision(q),
        'BLOCK': size,
        'BLOCK_D': block(q.shape[3], 128),
        'num_warps': 4,
        'num_stages': 2,
    }


@triton_op('densezoo::ragged_attention', mutates_args={})
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    place_q: Tensor | None,
    place_k: Tensor | None,
    index_q: Tensor | None,
    index_k: Tensor | None,
    write: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    list_k: Tensor | None,
    counts_k: Tensor | None,
    list_q: Tensor | None,
    counts_q: Tensor | None,
    unit: int,
    longest_q: int,
    longest_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, T, heads, D = q.shape
    entries = T if index_q is None else index_q.shape[0]
    out = q.new_zeros(q.shape) if index_q is not None else q.new_empty(q.shape)
    lse = q.new_empty((B, heads, entries), dtype=torch.float32)
    constants = _constants(q, bias, index_q, index_k, list_k, unit, max(longest_q, longest_k))
    groups = offsets_q.shape[0] - 1
    most = 0 if list_k is None else list_k.shape[-1]
    grid = (groups, (longest_q + constants['BLOCK'] - 1) // constants['BLOCK'], B * heads)
    sides = (q, k, v, bias, place_q, place_k, index_q, index_k, write, offsets_q, offsets_k, list_k, counts_k)
    numbers = (scale, heads, D, 0 if bias is None else bias.shape[1], groups, most, entries, T, k.shape[1])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    launch(_forward_kernel, grid, *sides, out, lse, *numbers, *strides, **constants)
    return out, lse


@triton_op('densezoo::ragged_attention_backward', mutates_args={})
def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    place_q: Tensor | None,
    place_k: Tensor | None,
    index_q: Tensor | None,
    index_k: Tensor | None,
    write: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    list_k: Tensor | None,
    counts_k: Tensor | None,
    list_q: Tensor | None,
    counts_q: Tensor | None,
    unit: int,
    longest_q: int,
    longest_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, heads, D = q.shape
    entries, entries_k = lse.shape[2], k.shape[1] if index_k is None else index_k.shape[0]
    N = 0 if bias is None else bias.shape[1]
    grad_q = q.new_zeros(q.shape) if index_q is not None else q.new_empty(q.shape)
    grad_bias = q.new_zeros((heads, N, N) if bias is not None else (0,), dtype=torch.float32)
    delta = torch.empty_like(lse)
    constants = _constants(q, bias, index_q, index_k, list_k, unit, max(longest_q, longest_k))
    size = constants['BLOCK']
    sides = (q, k, v, bias, place_q, place_k, index_q, index_k, write, offsets_q, offsets_k)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    groups, most = offsets_q.shape[0] - 1, 0 if list_k is None else list_k.shape[-1]
    numbers = (scale, heads, D, N, groups, most, entries, T, k.shape[1])
    grid = (groups, (longest_q + size - 1) // size, B * heads)
    given = (*sides, list_k, counts_k, out, lse, grad, delta, grad_q, grad_bias)
    launch(_backward_queries_kernel, grid, *given, *numbers, *strides, **constants)
    parts = [
        q.new_empty((B, entries_k, heads, D), dtype=torch.float32 if index_k is not None else q.dtype) for _ in 'kv'
    ]
    groups, most = offsets_k.shape[0] - 1, 0 if list_q is None else list_q.shape[-1]
    numbers = (scale, heads, D, N, groups, most, entries, T, T)
    grid = (groups, (longest_k + size - 1) // size, B * heads)
    targets = (list_q, counts_q, lse, grad, delta, *parts)
    launch(_backward_keys_kernel, grid, *sides, *targets, *numbers, entries_k, *strides, **constants)
    if index_k is not None:
        parts = [
            part.new_zeros(x.shape).index_add_(1, index_k, part).to(x.dtype)
            for part, x in zip(parts, (k, v), strict=True)
        ]
    return grad_q, parts[0], parts[1], grad_bias if bias is None else grad_bias.to(bias.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[15:]
    ctx.save_for_backward(*inputs[:15], *output)


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *given, out, lse = ctx.saved_tensors
    grads = _backward(grad.contiguous(), out, lse, *given, *ctx.numbers)
    wanted = (gradient if need else None for gradient, need in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, *(None for _ in range(15)))


_forward.register_autograd(_gradients, setup_context=_keep)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    *,
    longest: tuple[int, int],
    scale: float,
    bias: Tensor | None = None,
    places: tuple[Tensor | None, Tensor | None] = (None, None),
    index: tuple[Tensor | None, Tensor | None] = (None, None),
    write: Tensor | None = None,
    lists: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    unit: int = 64,
) -> Tensor:
    """(B, T, h, d) queries to (B, S, h, d) keys and values.

    Args:
        offsets_q, offsets_k: (W + 1,) the entries of each group of queries and of keys; with lists, those of the
            blocks of `unit` entries of each side.
        longest: entries of the longest group of each side.
        bias, places: (h, N, N), and the place of each entry of the queries and of the keys.
        index: the row of each entry of the queries and of the keys; write: the row of its result.
        lists: ((B, h, W, n) blocks of keys, (B, h, W) how many) of each block of queries, and the reverse of each
            block of keys.
    """
    (list_k, counts_k), (list_q, counts_q) = ((None, None), (None, None)) if lists is None else lists
    bias = None if bias is None else bias.contiguous()
    q, k, v = map(unit_stride, (q, k, v))
    sides = (*places, *index, write, offsets_q, offsets_k, list_k, counts_k, list_q, counts_q)
    return _forward(q, k, v, bias, *sides, unit, *longest, scale)[0]
