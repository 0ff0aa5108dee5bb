"""Positions and padding, computed in one place.

All sizes are computed ceil first (n = ceil(size / multiple), then n * multiple): written as `-size % multiple` the same
networks do not export with dynamic sizes.
"""

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor


def ceil_div(size: int, divisor: int) -> int:
    """ceil(size / divisor) for positive integers, symbolic ones too."""
    return (size + divisor - 1) // divisor


def padded(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`."""
    return ceil_div(size, multiple) * multiple


def grid_of(img_size: int | tuple[int, int] | None, stride: int, default: int = 224) -> tuple[int, int]:
    """Height and width of a map of that stride; img_size: of the image, None for the default."""
    height, width = to_2tuple(default if img_size is None else img_size)
    return ceil_div(height, stride), ceil_div(width, stride)


def pad_bottom_right(x: Tensor, multiple: int) -> Tensor:
    """Zeros below and to the right of (B, C, H, W), up to the next multiple of `multiple` in H and W."""
    height, width = x.shape[-2:]
    bottom, right = padded(height, multiple) - height, padded(width, multiple) - width
    if isinstance(bottom, int) and isinstance(right, int) and bottom == 0 and right == 0:
        return x  # symbolic sizes always go through pad: one graph for every size
    return F.pad(x, (0, right, 0, bottom))


def to_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B, H, W, C); free if x is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view with channels_last strides."""
    return x.permute(0, 3, 1, 2)


def to_windows(x: Tensor, side: int) -> Tensor:
    """(B, n side, m side, C) -> (B, n m, side * side, C)."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // side, side, W // side, side, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """What `to_windows` did, undone: (B, n m, side * side, C) -> (B, H, W, C)."""
    B, _, _, C = x.shape
    H, W = size
    x = x.reshape(B, H // side, W // side, side, side, C)
    return x.transpose(2, 3).reshape(B, H, W, C)
