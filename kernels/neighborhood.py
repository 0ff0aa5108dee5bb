"""Neighborhood attention: each query sees the k x k positions nearest to it, all of them on the map.

Along an axis of L positions with dilation e, the positions i = p + e n of one phase p = i mod e are neighbours; there
are n(p) = ceil((L - p) / e) of them. Query n sees m = s, ..., s + w - 1, with w = min(k, n(p)) and

    s = min(max(n - floor(k / 2), 0), n(p) - w)

so at the border the window is shifted inward, not cut, as NATTEN defines it; where a phase has fewer than k positions
(NATTEN refuses) it sees them all. Per head, with a bias for the offset of key to query:

    out[i] = sum over j of softmax_j(scale * q[i] . k[j] + bias[m_y - n_y + k - 1, m_x - n_x + k - 1]) * v[j]

Layout: qkv (B, H, W, 3C), channels (q | k | v, head, d); bias (heads, 2 ky - 1, 2 kx - 1); out (B, H, W, C).
Source: Neighborhood Attention Transformer, arXiv 2204.07143; dilation: arXiv 2209.15001.
"""

import torch
from torch import Tensor

from .dispatch import refuse_triton, select

Size = int | tuple[int, int]


def neighborhood_attention(
    qkv: Tensor,
    kernel: Size,
    *,
    heads: int,
    dilation: Size = 1,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sliding-window attention on a map.

    Args:
        qkv: (B, H, W, 3C) floating point.
        kernel: side, or (height, width), of the windows.
        heads: divides C.
        dilation: distance of neighbours, one or (vertical, horizontal).
        bias: (heads, 2 height - 1, 2 width - 1), added to the scaled products by offset.
        scale: of the products; (C / heads) ** -0.5 if None.
        backend: None chooses; 'torch' or 'triton' insist.

    Returns:
        (B, H, W, C) of the type of qkv.

    Raises:
        ValueError: a shape or device does not fit, or the backend cannot take the call.
    """
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    dilation = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    _check(qkv, kernel, heads, dilation, bias)
    scale = (qkv.shape[-1] // 3 // heads) ** -0.5 if scale is None else scale
    refusals = {'triton': can_run_triton(qkv, heads, bias), 'torch': None}
    if select('neighborhood_attention', backend, refusals) == 'triton':
        from .triton_neighborhood import neighborhood_attention_triton  # Triton is imported where it is used

        return neighborhood_attention_triton(qkv, kernel, heads=heads, dilation=dilation, bias=bias, scale=scale)
    return neighborhood_attention_reference(qkv, kernel, heads=heads, dilation=dilation, bias=bias, scale=scale)


def neighborhood_attention_reference(
    qkv: Tensor,
    kernel: tuple[int, int],
    *,
    heads: int,
    dilation: tuple[int, int],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition: one neighbour at a time, in two passes (products, then the weighted sum)."""
    B, H, W, C3 = qkv.shape
    query, key, value = qkv.reshape(B, H, W, 3, heads, C3 // 3 // heads).unbind(3)
    rows, seen_rows, up = neighbours(H, kernel[0], dilation[0], qkv.device)
    cols, seen_cols, left = neighbours(W, kernel[1], dilation[1], qkv.device)
    products = []
    for a in range(kernel[0]):
        key_rows = key[:, rows[:, a]]
        for b in range(kernel[1]):
            product = (query * key_rows[:, :, cols[:, b]]).sum(-1) * scale
            if bias is not None:
                product = product + bias.to(qkv.dtype)[:, up[:, a, None], left[:, b]].permute(1, 2, 0)
            seen = seen_rows[:, a, None] & seen_cols[:, b]
            products.append(product.masked_fill(~seen[..., None], float('-inf')))
    weights = torch.stack(products, -1).softmax(-1)
    out = torch.zeros_like(query)
    for a in range(kernel[0]):
        value_rows = value[:, rows[:, a]]
        for b in range(kernel[1]):
            out = out + weights[..., a * kernel[1] + b, None] * value_rows[:, :, cols[:, b]]
    return out.reshape(B, H, W, C3 // 3)


def neighbours(length: int, kernel: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, (length, kernel) each: positions, whether they are seen, offsets in the bias."""
    position = torch.arange(length, device=device)
    phase, n = position % dilation, position // dilation
    count = torch.div(length - phase + dilation - 1, dilation, rounding_mode='floor')
    width = count.clamp(max=kernel)
    start = torch.minimum((n - kernel // 2).clamp(min=0), count - width)
    m = start[:, None] + torch.arange(kernel, device=device)
    seen = m < (start + width)[:, None]
    m = torch.where(seen, m, n[:, None])
    return phase[:, None] + dilation * m, seen, m - n[:, None] + kernel - 1


def can_run_triton(qkv: Tensor, heads: int, bias: Tensor | None) -> str | None:
    """Why Triton cannot take this call."""
    return refuse_triton({'qkv': qkv, 'bias': bias}, width=qkv.shape[-1] // 3 // heads)


def _check(qkv: Tensor, kernel: tuple[int, int], heads: int, dilation: tuple[int, int], bias: Tensor | None) -> None:
    if qkv.ndim != 4:
        raise ValueError(f'qkv must be (B, H, W, 3C), got {tuple(qkv.shape)=}')
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f'heads must divide the channels of q, k and v, got {heads=}, {tuple(qkv.shape)=}')
    if any(n < 1 for n in (*kernel, *dilation)):
        raise ValueError(f'kernel and dilation must be positive, got {kernel=}, {dilation=}')
    expected = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    if bias is not None and tuple(bias.shape) != expected:
        raise ValueError(f'bias must be (heads, 2 height - 1, 2 width - 1) = {expected}, got {tuple(bias.shape)=}')
    if bias is not None and bias.device != qkv.device:
        raise ValueError(f'bias must be where qkv is, on {qkv.device}, got {bias.device}')
