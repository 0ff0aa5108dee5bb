"""Biases of attention computed from the offset between two positions, and their table for deployment.

Dynamic position bias of CrossFormer, arXiv 2108.00154 (https://github.com/cheerss/CrossFormer, MIT).
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from .linear import Linear
from .relative_position import relative_position_index
from .replace import replaced

_Model = TypeVar('_Model', bound=nn.Module)


class DynamicPositionBias(nn.Module):
    """Biases of attention by the offset between two positions, computed by an MLP: one set of weights for all windows.

    Args:
        dim: channels of the stage; the MLP is dim // 16 wide.
        heads: attention heads.
        window: side of the windows that are met most often, whose offsets are kept.
        reach: side of the largest window that `for_deploy` makes a table for; `window` if None.
    """

    offsets: Tensor
    index: Tensor

    def __init__(self, dim: int, heads: int, *, window: int, reach: int | None = None):
        super().__init__()
        width = dim // 16
        if width < 1:
            raise ValueError(f'dims must be at least 16 for the MLP of the position bias, got {dim=}')
        self.heads, self.window = heads, window
        self.reach = window if reach is None else reach
        self.pos_proj = Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), Linear(width, out)) for out in (width, width, heads)
        )
        self.register_buffer('offsets', _offsets(window, window), persistent=False)
        self.register_buffer('index', relative_position_index(window, window).flatten(), persistent=False)

    def forward(self, height: int, width: int) -> Tensor:
        """(heads, N, N) for windows of height x width positions in row order."""
        if height == width == self.window:
            offsets, index = self.offsets, self.index
        else:
            offsets = _offsets(height, width).to(self.offsets)
            index = relative_position_index(height, width).flatten().to(self.index.device)
        positions = height * width
        return self._mlp(offsets).t().index_select(1, index).view(self.heads, positions, positions)

    def _mlp(self, offsets: Tensor) -> Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))

    @torch.no_grad()
    def for_deploy(self, reach: int | None = None) -> 'PositionBiasTable':
        """A table in place of the MLP, for windows of up to `reach` positions a side."""
        reach = self.reach if reach is None else reach
        table = self._mlp(_offsets(reach, reach).to(self.offsets)).t()
        return PositionBiasTable(table.reshape(self.heads, 2 * reach - 1, 2 * reach - 1).clone(), self.window)

    def extra_repr(self) -> str:
        return f'heads={self.heads}, window={self.window}, reach={self.reach}'


class PositionBiasTable(nn.Module):
    """What a `DynamicPositionBias` computes for offsets below `reach`, as a table (heads, 2 reach - 1, 2 reach - 1)."""

    index: Tensor

    def __init__(self, table: Tensor, window: int):
        super().__init__()
        self.table = nn.Parameter(table)
        self.reach, self.window = (table.shape[-1] + 1) // 2, window
        index = relative_position_index(window, window).flatten()
        self.register_buffer('index', index.to(table.device), persistent=False)

    def forward(self, height: int, width: int) -> Tensor:
        """See `DynamicPositionBias.forward`."""
        reach, positions = self.reach, height * width
        if max(height, width) > reach:
            raise ValueError(
                f'the table of position biases reaches {reach} positions, got a window of {height} x {width}; '
                f'fold the model with fold_position_bias(model, reach={max(height, width)})'
            )
        table = self.table[:, reach - height : reach + height - 1, reach - width : reach + width - 1].flatten(1)
        regular = height == width == self.window
        index = self.index if regular else relative_position_index(height, width).flatten().to(self.index.device)
        return table.index_select(1, index).view(-1, positions, positions)

    def extra_repr(self) -> str:
        return f'heads={self.table.shape[0]}, reach={self.reach}'


def _offsets(height: int, width: int) -> Tensor:
    """((2 height - 1) * (2 width - 1), 2): offsets in the order of `relative_position_index`."""
    down, right = torch.arange(1 - height, height), torch.arange(1 - width, width)
    return torch.stack(torch.meshgrid(down, right, indexing='ij')).flatten(1).t().contiguous().float()


def fold_position_bias(model: _Model, reach: int | None = None) -> _Model:
    """A copy of a model whose dynamic position biases are tables, with the same outputs.

    Args:
        model: holds `DynamicPositionBias` modules; stays as it is.
        reach: side of the largest window; None for what the model meets at usual sizes.
    """
    return replaced(model, DynamicPositionBias, lambda bias: bias.for_deploy(reach))
