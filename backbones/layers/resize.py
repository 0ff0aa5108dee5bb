"""Tables of positions resized for another grid: one matrix per axis, built from the two sizes alone.

As products with matrices of a formula in the sizes, resizing exports with dynamic sizes and needs no Resize operator
(TensorRT refuses one with antialiasing); with fixed sizes it is an expression of constants, which exporters fold.
Values are those of torch.nn.functional.interpolate with align_corners=False.
"""

import torch
from torch import Tensor

from ...kernels.precision import full_precision
from .lookup import choose

# method -> (kernel's free coefficient or None for the triangle, whether the kernel widens when shrinking)
METHODS: dict[str, tuple[float | None, bool]] = {
    'bicubic_antialias': (-0.5, True),
    'bicubic': (-0.75, False),
    'bilinear': (None, False),
}


def same_size(size: tuple[int, int], grid: tuple[int, int]) -> bool:
    """Whether there is nothing to resize; symbolic sizes are always resized to: one graph for every size."""
    return all(isinstance(side, int) for side in size) and size == grid


def resize_table(table: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """A table (H, W, C) for a grid of another size, (*size, C), in float32.

    Args:
        method: 'bicubic_antialias', 'bicubic' or 'bilinear'.
    """
    height, width, _ = table.shape
    with full_precision(table):
        down = resize_matrix(height, size[0], method, table.device)
        across = resize_matrix(width, size[1], method, table.device)
        # the matrices are as good as constants: float32, small, and no more exact in another order
        rows = torch.tensordot(down, table.float(), dims=([1], [0]))  # (h, W, C)
        return torch.tensordot(across, rows, dims=([1], [1])).transpose(0, 1).contiguous()


def resize_matrix(old: int, new: int, method: str, device: torch.device | None = None) -> Tensor:
    """(new, old): entry (i, j) is the weight of old position j in new position i.

    Raises:
        ValueError: there is no such method.
    """
    coefficient, antialias = choose('method', method, METHODS)
    centre = (torch.arange(new, device=device, dtype=torch.float32) + 0.5) * (old / new) - 0.5
    position = torch.arange(old, device=device, dtype=torch.float32)
    if antialias:
        # max as arithmetic, since sizes may be symbolic: shrink is old / new where that is above 1, else 1
        shrink = torch.clamp_min(torch.ones((), device=device) * (old / new), 1.0)
        weights = _kernel((position[None, :] - centre[:, None]) / shrink, coefficient)
        return weights / weights.sum(1, keepdim=True)
    first = centre.floor()
    total = torch.zeros_like(first)[:, None] * position
    for tap in range(-1, 3) if coefficient is not None else range(2):
        at = first + tap
        inside = at.clamp(0, old - 1)  # the border is repeated outwards
        total = total + _kernel(at - centre, coefficient)[:, None] * (inside[:, None] == position[None, :])
    return total


def _kernel(distance: Tensor, coefficient: float | None) -> Tensor:
    """Keys' cubic kernel (support 2) with the free coefficient, or without one the triangle (support 1)."""
    x = distance.abs()
    if coefficient is None:
        return (1 - x).clamp_min(0)
    near = ((coefficient + 2) * x - (coefficient + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * coefficient
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
