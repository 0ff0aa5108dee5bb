"""HiLo attention: some heads attend inside small windows (high frequencies), the others to a pooled map (low ones).

With the heads' own queries q, keys k and values v:

    high[i] = sum over j in window(i) of softmax_j(scale * q[i] . k[j]) * v[j]
    low[i] = sum over p of softmax_p(scale * q[i] . k[p]) * v[p]                 (p: the positions of the pooled map)

Windows are w x w positions without overlap; the pooled map has one position for each. Layout: qkv (B, H, W, 3 Ch),
channels ordered (q | k | v, head, d); query (B, H, W, Cl), channels (head, d); key_value (B, ceil(H / w), ceil(W / w),
2 Cl), channels (k | v, head, d). Any H, W >= 1: the map is padded below and to the right up to whole windows.
`kernels/BENCHMARKS.md` says why the pooled keys are made outside. Source: Fast Vision Transformers with HiLo Attention,
arXiv 2205.13213.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import refuse_triton, select
from .window_attention import window_attention


def hilo_attention(
    qkv: Tensor,
    query: Tensor,
    key_value: Tensor,
    window: int,
    *,
    heads: tuple[int, int],
    scale: float | None = None,
    outside: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Window attention of the high heads and pooled attention of the low heads.

    With no low heads it is `window_attention`, with no high heads plain attention: neither needs this function.

    Args:
        qkv: (B, H, W, 3 Ch) floating point, of the high heads.
        query: (B, H, W, Cl) of the low heads.
        key_value: (B, ceil(H / w), ceil(W / w), 2 Cl) of the low heads, from the pooled map.
        window: side w of the windows.
        heads: how many are high and how many low; they divide Ch and Cl.
        scale: of the products; (Ch / high heads) ** -0.5 if None.
        outside: what padded positions hold in `qkv`, (3 Ch,); None: they are not attended to.
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        high (B, H, W, Ch) and low (B, H, W, Cl), of the type of qkv.

    Raises:
        ValueError: a shape does not fit, or the backend asked for cannot take the call.
    """
    _check(qkv, query, key_value, window, heads, outside)
    scale = (qkv.shape[-1] // 3 // heads[0]) ** -0.5 if scale is None else scale
    refusals = {'triton': can_run_triton(qkv, query, key_value, window, heads, outside), 'torch': None}
    if select('hilo_attention', backend, refusals) == 'triton':
        return _triton(qkv, query, key_value, window, heads=heads, scale=scale, outside=outside)
    return hilo_attention_reference(qkv, query, key_value, window, heads=heads, scale=scale, outside=outside)


def hilo_attention_reference(
    qkv: Tensor,
    query: Tensor,
    key_value: Tensor,
    window: int,
    *,
    heads: tuple[int, int],
    scale: float,
    outside: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch."""
    B, H, W, C = query.shape
    query = query.reshape(B, H * W, heads[1], -1).transpose(1, 2)
    key, value = key_value.flatten(1, 2).unflatten(2, (2, heads[1], -1)).permute(2, 0, 3, 1, 4).unbind(0)
    low = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return _high(qkv, window, heads[0], scale, outside), low.transpose(1, 2).reshape(B, H, W, C)


def _high(qkv: Tensor, window: int, heads: int, scale: float, outside: Tensor | None) -> Tensor:
    """Attention in windows of few positions, as batched products: on a CPU a little faster than fused attention."""
    if outside is None:  # padded positions are masked
        return window_attention(qkv, window, heads=heads, scale=scale, backend='torch')
    B, H, W, C3 = qkv.shape
    rows, cols = (H + window - 1) // window, (W + window - 1) // window
    Hp, Wp = rows * window, cols * window
    whole = isinstance(Hp - H, int) and isinstance(Wp - W, int) and Hp == H and Wp == W
    if not whole:  # symbolic sizes always go through pad: one graph for every size
        outside = outside.to(qkv.dtype)
        qkv = F.pad(qkv - outside, (0, 0, 0, Wp - W, 0, Hp - H)) + outside
    # (3, B, rows, cols, heads, window, window, d) in memory: one copy
    qkv = qkv.reshape(B, rows, window, cols, window, 3, heads, C3 // 3 // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = qkv.reshape(3, B * rows * cols * heads, window * window, C3 // 3 // heads).unbind(0)
    weight = _softmax(torch.matmul(query * scale, key.transpose(1, 2)))
    out = torch.matmul(weight.to(value.dtype), value).reshape(B, rows, cols, heads, window, window, C3 // 3 // heads)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, Hp, Wp, C3 // 3)
    if whole:
        return out
    return out.narrow(1, 0, H).narrow(2, 0, W).clone(memory_format=torch.contiguous_format)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension of (B, N, N). In eager mode on a CPU few keys go first: rows of four leave the vectors of
    PyTorch's softmax empty (392 of them 32 us, 5 so; 6272 of them 495 and 30)."""
    if logits.device.type != 'cpu' or torch.compiler.is_compiling() or logits.shape[-1] > 16:
        return logits.softmax(-1)
    return logits.permute(2, 0, 1).softmax(0).permute(1, 2, 0)


def _triton(
    qkv: Tensor,
    query: Tensor,
    key_value: Tensor,
    window: int,
    *,
    heads: tuple[int, int],
    scale: float,
    outside: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both branches read their maps as they lie: the windows kernel, and all positions as one group of queries."""
    from .triton_ragged import ragged_attention  # Triton is imported where it is used

    high = window_attention(qkv, window, heads=heads[0], scale=scale, outside=outside, backend='triton')
    B, H, W, C = query.shape
    key, value = key_value.flatten(1, 2).unflatten(2, (2, heads[1], -1)).unbind(2)
    ends = [torch.tensor([0, count], device=query.device) for count in (H * W, key.shape[1])]
    queries = query.flatten(1, 2).unflatten(2, (heads[1], -1))
    low = ragged_attention(queries, key, value, *ends, longest=(H * W, key.shape[1]), scale=scale)
    return high, low.reshape(B, H, W, C)


def can_run_triton(
    qkv: Tensor, query: Tensor, key_value: Tensor, window: int, heads: tuple[int, int], outside: Tensor | None
) -> str | None:
    """Why Triton cannot take this call."""
    if window > 64:
        return f'windows are {window} positions wide, and the kernels take up to 64'
    tensors = {'qkv': qkv, 'query': query, 'key_value': key_value, 'outside': outside}
    width = max(qkv.shape[-1] // 3 // heads[0], query.shape[-1] // heads[1])
    return refuse_triton(tensors, width=width)


def _check(
    qkv: Tensor, query: Tensor, key_value: Tensor, window: int, heads: tuple[int, int], outside: Tensor | None
) -> None:
    if qkv.ndim != 4 or query.ndim != 4 or key_value.ndim != 4:
        raise ValueError(
            'qkv, query and key_value must have four dimensions, got '
            f'{tuple(qkv.shape)=}, {tuple(query.shape)=}, {tuple(key_value.shape)=}'
        )
    if window < 1 or any(count < 1 for count in heads):
        raise ValueError(f'window and both numbers of heads must be positive, got {window=}, {heads=}')
    if qkv.shape[-1] % (3 * heads[0]) or query.shape[-1] % heads[1]:
        raise ValueError(
            f'heads must divide the channels of their branch, got {heads=}, {tuple(qkv.shape)=}, {tuple(query.shape)=}'
        )
    B, H, W, C = query.shape
    if tuple(qkv.shape[:3]) != (B, H, W):
        raise ValueError(f'qkv and query must be of one map, got {tuple(qkv.shape)=}, {tuple(query.shape)=}')
    pooled = (B, (H + window - 1) // window, (W + window - 1) // window, 2 * C)
    if tuple(key_value.shape) != pooled:
        raise ValueError(f'key_value must be {pooled}, one position for each window, got {tuple(key_value.shape)=}')
    if outside is not None and tuple(outside.shape) != (qkv.shape[-1],):
        raise ValueError(f'outside must be ({qkv.shape[-1]},), one row of qkv, got {tuple(outside.shape)=}')
