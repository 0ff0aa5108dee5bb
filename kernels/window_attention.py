"""Attention inside the windows of an image, read from the map as the linear layer leaves it.

With q, k, v the thirds of qkv, for a query at i and the positions j of its window:

    out[i] = sum over j of softmax_j(scale * q[i] . k[j] + bias[i, j]) * v[j]          (per head)

Windows are wh x ww positions of the map, which is first padded (`pad` above and to the left, then below and to the
right up to whole windows), then shifted: window (a, b) holds the rows a * wh + sh, ..., and the rows that leave the map
at the bottom come back at the top, as do columns; parts of a window that were not neighbours do not see each other.
With a dilation d, windows take every d-th row and column, so that a window spans d * wh x d * ww positions.

With `cosine` (Swin v2), q and k are first divided by their norms, and cosine[head] takes the place of scale.

Layout: qkv (B, H, W, 3C), channels ordered (q | k | v, head, d); out (B, H, W, C). Any H, W >= 1, windows larger than
the map too.
Source: Swin Transformer, arXiv 2103.14030; cosine attention: Swin Transformer V2, arXiv 2111.09883; long-distance
attention: CrossFormer, arXiv 2108.00154.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import refuse_triton, select
from .window_parts import window_attention_in_parts

Size = int | tuple[int, int]
_MOST = 4096  # positions of a window that the Triton kernels take


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
    cosine: Tensor | None = None,
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
        cosine: (heads,), the factors of the products of queries and keys of norm 1; without it no norm is taken.
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        (B, H, W, C) of the type of qkv.

    Raises:
        ValueError: a shape or device does not fit, a shift or pad is not below its window, both scale and cosine are
            given, or the backend cannot take the call.
    """
    window, shift = _pair(window), _pair(shift)
    _check(qkv, window, shift, heads, bias, outside, pad, dilation, scale, cosine)
    scale = (qkv.shape[-1] // 3 // heads) ** -0.5 if scale is None else scale
    refusals = {'triton': can_run_triton(qkv, window, heads, bias, outside, cosine), 'torch': None}
    attend: Callable[..., Tensor]
    if select('window_attention', backend, refusals) == 'triton':
        from .triton_window import window_attention_triton  # Triton is imported where it is used

        attend = window_attention_triton
    elif _can_run_in_parts(qkv, bias, outside, cosine):
        attend = window_attention_in_parts
    else:
        attend = window_attention_reference
    options: dict[str, Any] = {'bias': bias, 'outside': outside, 'pad': pad, 'dilation': dilation, 'cosine': cosine}
    return attend(qkv, window, shift, heads=heads, scale=scale, **options)


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
    cosine: Tensor | None = None,
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
    query, key, value = x.unbind(0)
    if cosine is not None:
        query, key = F.normalize(query, dim=-1) * cosine[:, None, None].to(qkv.dtype), F.normalize(key, dim=-1)
        scale = 1.0
    mask = None if bias is None else bias.to(qkv.dtype)
    if shift == (0, 0) and outside is not None:
        query, key, value = (t.flatten(0, 1) for t in (query, key, value))  # one bias for all windows
    else:
        query, key, value = (t.flatten(1, 2) for t in (query, key, value))  # one mask for all images
        seen = window_mask((H, W), window, shift, pad=pad, dilation=d, hide_padding=outside is None, like=qkv)
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


def can_run_triton(
    qkv: Tensor,
    window: tuple[int, int],
    heads: int,
    bias: Tensor | None,
    outside: Tensor | None,
    cosine: Tensor | None,
) -> str | None:
    """Why Triton cannot take this call."""
    if window[0] * window[1] > _MOST:
        return f'windows have {window[0] * window[1]} positions, and the kernels take up to {_MOST}'
    tensors = {'qkv': qkv, 'bias': bias, 'outside': outside, 'cosine': cosine}
    return refuse_triton(tensors, width=qkv.shape[-1] // 3 // heads)


def _can_run_in_parts(*tensors: Tensor | None) -> bool:
    """Whether this is a plain call on a CPU: compilers and exporters take the definition, and so do gradients."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or given[0].device.type != 'cpu':
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))


def _pair(value: Size) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def window_mask(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    pad: tuple[int, int] = (0, 0),
    dilation: int = 1,
    hide_padding: bool,
    like: Tensor,
) -> Tensor:
    """What is added to the logits of padded, then shifted windows: 0 where a position sees another, else -inf.

    Args:
        size: (H, W) of the map.
        window, shift, pad, dilation: see `window_attention`.
        hide_padding: positions beyond the map are not seen.
        like: of the wanted type and device.

    Returns:
        (windows of an image, 1, N, N).
    """
    (wh, ww), d = window, dilation
    rows, cols = ((n + before + w * d - 1) // (w * d) for n, before, w in zip(size, pad, window))
    vertical, inside_vertical = _labels(rows * wh * d, shift[0] * d, pad[0], size[0], like.device)
    horizontal, inside_horizontal = _labels(cols * ww * d, shift[1] * d, pad[1], size[1], like.device)
    label = vertical[:, None] * 2 + horizontal
    if hide_padding:
        label = torch.where(inside_vertical[:, None] & inside_horizontal, label, -1)
    label = label.reshape(rows, wh, d, cols, ww, d).permute(2, 5, 0, 3, 1, 4)
    # a copy always: whether reshape needs one depends on the number of windows, which may be symbolic
    label = label.clone(memory_format=torch.contiguous_format).view(-1, 1, wh * ww)
    allowed = label[..., None, :] == label[..., :, None]
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, float('-inf'))


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
    scale: float | None,
    cosine: Tensor | None,
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
    if cosine is not None and tuple(cosine.shape) != (heads,):
        raise ValueError(f'cosine must be ({heads},), one factor per head, got {tuple(cosine.shape)=}')
    if cosine is not None and scale is not None:
        raise ValueError(f'cosine takes the place of scale; pass one of them, got {scale=}')
    for name, tensor in (('bias', bias), ('outside', outside), ('cosine', cosine)):
        if tensor is not None and tensor.device != qkv.device:
            raise ValueError(f'{name} must be where qkv is, on {qkv.device}, got {name} on {tensor.device}')
