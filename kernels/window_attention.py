"""Attention inside the windows of an image, read from the map as the linear layer leaves it.

With q, k, v the thirds of qkv, for a query at i and the positions j of its window:

    out[i] = sum over j of softmax_j(scale * q[i] . k[j] + bias[i, j]) * v[j]          (per head)

Windows are wh x ww positions of the map, which is first padded (`pad` above and to the left, then below and to the
right up to whole windows), then shifted: window (a, b) holds the rows a * wh + sh, ..., and the rows that leave the map
at the bottom come back at the top, as do columns; parts of a window that were not neighbours do not see each other.
With a dilation d, windows take every d-th row and column, so that a window spans d * wh x d * ww positions.

Layout: qkv (B, H, W, 3C), channels ordered (q | k | v, head, d); out (B, H, W, C). Any H, W >= 1, windows larger than
the map too.
Source: Swin Transformer, arXiv 2103.14030; long-distance attention: CrossFormer, arXiv 2108.00154.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import select
from .window_parts import window_attention_in_parts

Size = int | tuple[int, int]


def window_attention(
    qkv: Tensor,
    window: Size,
    shift: Size = 0,
    *,
    heads: int,
    bias: Tensor | None = None,
    scale: float | None = None,
    outside: Tensor | None = None,
    pad: tuple[int, int] = (0, 0),
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Shifted-window attention on a map.

    Args:
        qkv: (B, H, W, 3C) floating point.
        window: side, or (height, width), of the windows.
        shift: rows and columns the windows are shifted by, from 0 to window - 1.
        heads: divides C.
        bias: (heads, N, N), added to the scaled products; N = wh * ww positions in row order. None adds nothing.
        scale: of the products; (C / heads) ** -0.5 if None.
        outside: what padded positions hold, (3C,); None: they are not attended to.
        pad: rows above and columns to the left of the map, fewer than a window; the rest of the padding goes below
            and to the right.
        dilation: distance of neighbours in a window.
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        (B, H, W, C) of the type of qkv.

    Raises:
        ValueError: a shape does not fit, a shift or pad is not below its window, or the backend cannot take the call.
    """
    window, shift = _pair(window), _pair(shift)
    _check(qkv, window, shift, heads, bias, outside, pad, dilation)
    scale = (qkv.shape[-1] // 3 // heads) ** -0.5 if scale is None else scale
    select('window_attention', backend, {'triton': can_run_triton(qkv), 'torch': None})
    attend = window_attention_in_parts if _can_run_in_parts(qkv, bias, outside) else window_attention_reference
    return attend(qkv, window, shift, heads=heads, bias=bias, scale=scale, outside=outside, pad=pad, dilation=dilation)


def window_attention_reference(
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
) -> Tensor:
    """The definition in plain PyTorch: pad, roll, cut into windows, attend, and back."""
    B, H, W, C3 = qkv.shape
    wh, ww = window
    (top, left), d = pad, dilation
    rows = (H + top + wh * d - 1) // (wh * d)  # of windows
    cols = (W + left + ww * d - 1) // (ww * d)
    Hp, Wp = rows * wh * d, cols * ww * d
    padding = (0, 0, left, Wp - W - left, top, Hp - H - top)
    exact = isinstance(H, int) and isinstance(W, int) and (Hp, Wp) == (H, W)  # symbolic sizes never are
    if exact:
        x = qkv
    elif outside is None:
        x = F.pad(qkv, padding)
    else:
        outside = outside.to(qkv.dtype)
        x = F.pad(qkv - outside, padding) + outside
    if shift != (0, 0):
        x = x.roll((-shift[0] * d, -shift[1] * d), (1, 2))
    # TensorRT has eight dimensions at most: each phase of a dilation becomes an image of its own.
    if d > 1:
        x = x.reshape(B, rows * wh, d, cols * ww, d, C3).permute(0, 2, 4, 1, 3, 5)
    # (3, B, windows, heads, N, channels) in memory: one copy
    x = x.reshape(B * d * d, rows, wh, cols, ww, 3, heads, C3 // 3 // heads)
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, d * d * rows * cols, heads, wh * ww, -1)
    mask = None if bias is None else bias.to(qkv.dtype)
    if shift == (0, 0) and outside is not None:
        query, key, value = x.flatten(1, 2).unbind(0)  # one bias for all windows
    else:
        query, key, value = x.flatten(2, 3).unbind(0)  # one mask for all images
        vertical, inside_vertical = _labels(Hp, shift[0] * d, top, H, qkv.device)
        horizontal, inside_horizontal = _labels(Wp, shift[1] * d, left, W, qkv.device)
        label = vertical[:, None] * 2 + horizontal
        if outside is None:
            label = torch.where(inside_vertical[:, None] & inside_horizontal, label, -1)
        label = label.reshape(rows, wh, d, cols, ww, d).permute(2, 5, 0, 3, 1, 4)
        # a copy always: whether reshape needs one depends on the number of windows, which may be symbolic
        label = label.clone(memory_format=torch.contiguous_format).view(-1, 1, wh * ww)
        allowed = label[..., None, :] == label[..., :, None]
        seen = torch.zeros_like(allowed, dtype=qkv.dtype).masked_fill(~allowed, float('-inf'))
        mask = (seen.expand(-1, heads, -1, -1) if mask is None else seen + mask).flatten(0, 1)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    out = out.reshape(B * d * d, rows, cols, heads, wh, ww, -1).permute(0, 1, 4, 2, 5, 3, 6)
    if d > 1:
        out = out.reshape(B, d, d, rows * wh, cols * ww, C3 // 3).permute(0, 3, 1, 4, 2, 5)
    out = out.reshape(B, Hp, Wp, C3 // 3)
    if shift != (0, 0):
        out = out.roll((shift[0] * d, shift[1] * d), (1, 2))
    if exact:
        return out
    # not .contiguous(): whether it copies depends on the sizes, which may be symbolic
    return out[:, top : top + H, left : left + W].clone(memory_format=torch.contiguous_format)


def can_run_triton(qkv: Tensor) -> str | None:
    """Why Triton cannot take this call."""
    return 'no Triton kernel is written for it'


def _can_run_in_parts(*tensors: Tensor | None) -> bool:
    """Whether this is a plain call on a CPU: compilers and exporters take the definition, and so do gradients."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or given[0].device.type != 'cpu':
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))


def _pair(value: Size) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _labels(padded: int, step: int, before: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each position of a rolled axis: 1 if it came back at the other side, else 0; and whether it is the map's."""
    rolled = torch.arange(padded, device=device)
    position = torch.where(rolled >= padded - step, rolled - padded, rolled) + step - before
    return (rolled >= padded - step).long(), (position >= 0) & (position < size)


def _check(
    qkv: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    bias: Tensor | None,
    outside: Tensor | None,
    pad: tuple[int, int],
    dilation: int,
) -> None:
    if qkv.ndim != 4:
        raise ValueError(f'qkv must be (B, H, W, 3C), got {tuple(qkv.shape)=}')
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f'heads must divide the channels of q, k and v, got {heads=}, {tuple(qkv.shape)=}')
    if dilation < 1 or any(w < 1 for w in window):
        raise ValueError(f'window and dilation must be positive, got {window=}, {dilation=}')
    if any(not 0 <= s < w for s, w in zip(shift, window)):
        raise ValueError(f'shift must be from 0 to window - 1, got {shift=}, {window=}')
    if any(not 0 <= p < w * dilation for p, w in zip(pad, window)):
        raise ValueError(f'pad must be from 0 to below a window, got {pad=}, {window=}, {dilation=}')
    N = window[0] * window[1]
    if bias is not None and tuple(bias.shape) != (heads, N, N):
        raise ValueError(f'bias must be (heads, N, N) = {(heads, N, N)}, got {tuple(bias.shape)=}')
    if outside is not None and tuple(outside.shape) != (qkv.shape[-1],):
        raise ValueError(f'outside must be ({qkv.shape[-1]},), one row of qkv, got {tuple(outside.shape)=}')
