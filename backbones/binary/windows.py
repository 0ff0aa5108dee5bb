"""Maps as windows, for attention whose map is looked at: fused kernels keep it to themselves.

Padding goes below and to the right, as in `kernels.window_attention` without `pad`; then the map is shifted along with
it, and what were no neighbours do not see each other.
"""

# B batch, H W size of the map, K channels, n windows of an image, N positions of a window
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import window_mask
from ..layers.grid import from_windows, padded, to_windows
from ..layers.resize import same_size


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
    _, H, W, _ = x.shape
    Hp, Wp = padded(H, window), padded(W, window)
    padding = (0, 0, 0, Wp - W, 0, Hp - H)
    exact = same_size((H, W), (Hp, Wp))
    if not exact:
        x = F.pad(x, padding) if outside is None else F.pad(x - outside, padding) + outside
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    x = to_windows(x, window)
    if shift or (outside is None and not exact):
        mask = window_mask((H, W), (window, window), (shift, shift), hide_padding=outside is None, like=x)
        bias = mask if bias is None else bias + mask
    out = from_windows(attend(x, bias), window, (Hp, Wp))
    if shift:
        out = out.roll((shift, shift), (1, 2))
    # not .contiguous(): whether it copies depends on the sizes, which may be symbolic
    return out if exact else out[:, :H, :W].clone(memory_format=torch.contiguous_format)
