"""Learned positions of tokens on a grid, for every size of grid."""

# B batch, C channels, H W size of the grid, P prefix tokens (class, distillation)
import logging
import math

import torch
from torch import Tensor, nn

from .resize import METHODS, resize_table, same_size

_log = logging.getLogger('densezoo')


class PositionTable(nn.Module):
    """A table (1, P + H W, C) of positions, resized for other grids than its own; rows of prefix tokens come first.

    Args:
        dim: channels.
        grid: (H, W) that the table is made for.
        prefix: rows before those of the grid; 0 where prefix tokens have no position.
        method: how it is resized, see `resize.METHODS`.
        trainable: False for tables that stay as computed, such as sinusoids.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        *,
        prefix: int = 0,
        method: str = 'bicubic_antialias',
        trainable: bool = True,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f'method must be one of {", ".join(METHODS)}, got {method=}')
        self.grid, self.prefix, self.method = grid, prefix, method
        self.table = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], dim), requires_grad=trainable)

    def forward(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        """Positions (1, P, C) of the prefix tokens, None without any, and (1, H W, C) of a grid of this size."""
        prefix = self.table[:, : self.prefix] if self.prefix else None
        positions = self.table[:, self.prefix :] if self.prefix else self.table
        if same_size(grid, self.grid):
            return prefix, positions
        resized = resize_table(positions[0].unflatten(0, self.grid), grid, self.method)
        return prefix, resized.flatten(0, 1)[None].to(self.table.dtype)

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Resizes a checkpoint's table for this grid; that of another grid must be square, as no file states it.

        Raises:
            ValueError: the number of rows is not that of prefix tokens and a square.
        """
        table = state.get(prefix + 'table')
        if not isinstance(table, Tensor) or table.ndim != 3 or table.shape == self.table.shape:
            return
        rows = table.shape[1] - self.prefix
        side = math.isqrt(max(rows, 0))
        if side == 0 or side * side != rows:
            raise ValueError(
                f'{prefix}table has {table.shape[1]} rows, expected {self.prefix} of prefix tokens and a square grid; '
                'is it from a model with other prefix tokens?'
            )
        if table.shape[-1] == self.table.shape[-1] and (side, side) != self.grid:
            resized = resize_table(table[0, self.prefix :].unflatten(0, (side, side)), self.grid, self.method)
            resized = resized.flatten(0, 1)[None].to(table.dtype)
            state[prefix + 'table'] = torch.cat((table[:, : self.prefix], resized), 1)
            _log.info('%stable resampled from a grid of %d x %d to %d x %d', prefix, side, side, *self.grid)

    def extra_repr(self) -> str:
        return f'grid={self.grid}, prefix={self.prefix}, method={self.method!r}'
