"""Learned biases of attention by the offset between two positions of a window. Swin Transformer, arXiv 2103.14030."""

import torch
from torch import Tensor, nn


class RelativePositionBias(nn.Module):
    """out[h, i, j] = table[offset of position i from position j, h]; a row of the table for each possible offset.

    Args:
        window: side, or (height, width), of the window; its N positions are numbered in row order.
        heads: attention heads.
    """

    index: Tensor

    def __init__(self, window: int | tuple[int, int], heads: int):
        super().__init__()
        self.window = window if isinstance(window, tuple) else (window, window)
        self.heads = heads
        height, width = self.window
        self.table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), heads))
        self.register_buffer('index', relative_position_index(height, width).flatten(), persistent=False)
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        """(heads, N, N), contiguous."""
        positions = self.window[0] * self.window[1]
        return self.table.t().index_select(1, self.index).view(self.heads, positions, positions)

    def extra_repr(self) -> str:
        return f'window={self.window}, heads={self.heads}'


def relative_position_index(height: int, width: int) -> Tensor:
    """(N, N) rows of a table that is ordered by row offset, then column offset, each from 1 - size to size - 1."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None, :] + height - 1
    right = column[:, None] - column[None, :] + width - 1
    return down * (2 * width - 1) + right
