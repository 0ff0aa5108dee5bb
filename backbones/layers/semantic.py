"""Semantic tokens: few tokens that stand for a map, made from it by pooling and attention, and given back to it.

Making Vision Transformers Efficient from A Token Sparsification View, arXiv 2303.08685 (STViT). Maps are (B, H, W, C);
tokens lie on a map of their own, with s x s of them for each window of w x w positions. Where windows do not divide the
map, its last row and column are repeated; the patch of keys around a window never leaves the map.
"""

# B batch, H W size of the map, C channels, h heads, w side of a window, s x s tokens of each, n m windows down, across
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import ceil_div
from .linear import Linear
from .relative_position import relative_position_index


def bins(size: int, count: int) -> list[tuple[int, int]]:
    """First and last + 1 of the positions that each of `count` parts of `size` pools; neighbours may overlap by one."""
    return [(i * size // count, ceil_div((i + 1) * size, count)) for i in range(count)]


def pool_windows(x: Tensor, window: int, sample: int) -> Tensor:
    """The maxima of s x s parts of each window: (B, H, W, C) -> (B, n s, m s, C)."""
    B, H, W, C = x.shape
    down, across = ceil_div(H, window), ceil_div(W, window)
    x = x.index_select(1, torch.arange(down * window, device=x.device).clamp(max=H - 1))
    x = x.index_select(2, torch.arange(across * window, device=x.device).clamp(max=W - 1))
    x = x.reshape(B, down, window, across * window, C)
    x = torch.stack([x[:, :, first:last].amax(2) for first, last in bins(window, sample)], 2)
    x = x.reshape(B, down * sample, across, window, C)
    x = torch.stack([x[:, :, :, first:last].amax(3) for first, last in bins(window, sample)], 3)
    return x.reshape(B, down * sample, across * sample, C)


def patches_around(x: Tensor, window: int, patch: int) -> Tensor:
    """The patch of `patch` x `patch` positions around each window, moved inwards at the border, as far as the map goes:
    (B, H, W, C) -> (B, n m, positions, C)."""
    B, H, W, C = x.shape
    rows, columns = (_starts(size, window, patch, x.device) for size in (H, W))
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    x = x.reshape(B, rows.shape[0], rows.shape[1], columns.shape[0], columns.shape[1], C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _starts(size: int, window: int, patch: int, device: torch.device) -> Tensor:
    """(n, positions): the positions of each window's patch along one axis."""
    reach = patch if size >= patch else size
    first = torch.arange(ceil_div(size, window), device=device) * window - (patch - window) // 2
    return first.clamp(0, size - reach)[:, None] + torch.arange(reach, device=device)


class OffsetBias(nn.Module):
    """A learned bias of attention by offset on a map of any size: offsets beyond the table take its last entry.

    Args:
        side: of the square map that the table is made for.
        heads: attention heads.
    """

    def __init__(self, side: int, heads: int):
        super().__init__()
        self.side, self.heads = side, heads
        self.table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """(heads, N, N) for a map of this size, N = H W."""
        if size == (self.side, self.side):
            index = relative_position_index(*size).to(self.table.device)
        else:
            down, right = (self._offsets(length) for length in size)
            index = down[:, None, :, None] * (2 * self.side - 1) + right[None, :, None, :]
            index = index.flatten(2).flatten(0, 1)
        return self.table.t()[:, index]

    def _offsets(self, length: int) -> Tensor:
        place = torch.arange(length, device=self.table.device)
        return (place[:, None] - place[None, :]).clamp(1 - self.side, self.side - 1) + self.side - 1


class SemanticAttention(nn.Module):
    """Attention of queries to a context, with separate projections; (..., N, C) and (..., M, C) -> (..., N, C).

    Args:
        dim: channels.
        num_heads: divides dim.
        qkv_bias: learn a bias of queries, keys and values.
        bias_side: side of the map of queries and keys whose offsets have a learned bias; None for none.
    """

    last_linear = 'proj'

    def __init__(self, *, dim: int, num_heads: int, qkv_bias: bool = True, bias_side: int | None = None):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads must divide dim, got {num_heads=}, {dim=}')
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.position_bias = None if bias_side is None else OffsetBias(bias_side, num_heads)
        self.proj = Linear(dim, dim)

    def forward(self, query: Tensor, keys_values: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """
        Args:
            query: (..., N, C), projected here.
            keys_values: (..., M, 2C), as `kv` gives them: a context that several queries read is projected once.
            size: of the map that the queries lie on, where there is a bias.
        """
        ahead = query.shape[:-2]
        query = self._heads(self.q(query))
        key, value = (self._heads(t) for t in keys_values.chunk(2, -1))
        bias = self.position_bias(size) if self.position_bias is not None else None
        out = F.scaled_dot_product_attention(query, key, value, None if bias is None else bias.to(query.dtype))
        return self.proj(out.transpose(1, 2).reshape(*ahead, -1, self.num_heads * out.shape[-1]))

    def _heads(self, x: Tensor) -> Tensor:
        """(..., N, C) -> (product of ..., h, N, d)."""
        return x.flatten(0, -3).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
