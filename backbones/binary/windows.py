"""Maps as windows, for attention whose map is looked at: fused kernels keep it to themselves.

Padding goes below and to the right, as in `kernels.window_attention` without `pad`; then the map is shifted along with
it, and what were no neighbours do not see each other.
"""

# B batch, H W size of the map, K channels, n windows of an image, N positions of a window
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.grid import ceil_div


def in_windows(
    x: Tensor,
    attend: Callable[[Tensor, Tensor | None], Tensor],
    window: int,
    shift: int = 0,
    *,
    bias: Tensor | None = None,
    outside: Tensor | None = None,
) -> Tensor:
    """Cuts a map into windows, attends in each, and puts the map together again.

    Args:
        x: (B, H, W, K).
        attend: (windows (B, n, N, K), what is added to logits, broadcast to (B, n, heads, N, N), or None) -> (B, n, N,
            C).
        window: side of the windows.
        shift: rows and columns that the windows are shifted by, below `window`.
        bias: (heads, N, N) for each window, or None.
        outside: (K,) that padded positions hold; None: they are not attended to.

    Returns:
        (B, H, W, C).
    """
    B, H, W, K = x.shape
    rows, cols = ceil_div(H, window), ceil_div(W, window)
    Hp, Wp = rows * window, cols * window
    padding = (0, 0, 0, Wp - W, 0, Hp - H)
    exact = isinstance(H, int) and isinstance(W, int) and (Hp, Wp) == (H, W)  # symbolic sizes never are
    if not exact:
        x = F.pad(x, padding) if outside is None else F.pad(x - outside, padding) + outside
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = x.reshape(B, rows, window, cols, window, K).transpose(2, 3).reshape(B, rows * cols, window * window, K)
    if shift or (outside is None and not exact):
        mask = _mask(H, W, rows, cols, window, shift, outside is None, x)
        bias = mask if bias is None else bias + mask
    out = attend(x, bias)
    out = out.reshape(B, rows, cols, window, window, -1).transpose(2, 3).reshape(B, Hp, Wp, -1)
    if shift:
        out = out.roll((shift, shift), (1, 2))
    # not .contiguous(): whether it copies depends on the sizes, which may be symbolic
    return out if exact else out[:, :H, :W].clone(memory_format=torch.contiguous_format)


def _mask(H: int, W: int, rows: int, cols: int, window: int, shift: int, mask_padding: bool, like: Tensor) -> Tensor:
    """(n, 1, N, N): 0 where a position sees another, else -inf."""
    (vertical, inside_vertical), (horizontal, inside_horizontal) = (
        _labels(count * window, shift, size, like.device) for count, size in ((rows, H), (cols, W))
    )
    label = vertical[:, None] * 2 + horizontal
    if mask_padding:
        label = torch.where(inside_vertical[:, None] & inside_horizontal, label, -1)
    # a copy always: whether reshape needs one depends on the number of windows, which may be symbolic
    label = label.reshape(rows, window, cols, window).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    label = label.view(-1, 1, window * window)
    allowed = label[..., None, :] == label[..., :, None]
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, float('-inf'))


def _labels(padded: int, shift: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row of the shifted map: 1 if it came round from the other side, and whether it lies in the image."""
    positions = torch.arange(padded, device=device)
    came_round = (positions >= padded - shift).long()
    return came_round, positions + shift - came_round * padded < size
