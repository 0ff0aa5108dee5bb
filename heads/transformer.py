"""Transformer layers of the set-prediction detectors (DETR, Carion et al. 2020, arXiv:2005.12872).

Unlike torch's own layers they add positions to queries and keys of every attention, never to values. Parameters are
called as in the authors' code, and so as in torch's.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deformable_attention import DeformableAttention
from .pyramid import Size, choose, positive

# B batch, N cells of the map(s), Q queries, C width

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {'relu': F.relu, 'gelu': F.gelu, 'silu': F.silu}


class MLP(nn.Module):
    """Linear layers with ReLU between; (..., in) -> (..., out)."""

    def __init__(self, *, in_channels: int, channels: int, out_channels: int, depth: int):
        super().__init__()
        widths = [in_channels, *[channels] * (depth - 1), out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Layer(nn.Module):
    """What all layers have: the two linear layers after attention, and where norms stand.

    Args:
        channels: C.
        hidden: width between the two linear layers.
        num_norms: one for each part with a shortcut.
        dropout: of attention's and the linear layers' outputs.
        act: 'relu', 'gelu' or 'silu'.
        pre_norm: norms before each part rather than after its shortcut.
    """

    def __init__(self, *, channels: int, hidden: int, num_norms: int, dropout: float, act: str, pre_norm: bool):
        super().__init__()
        self.linear1 = nn.Linear(channels, positive('hidden', hidden))
        self.linear2 = nn.Linear(hidden, channels)
        for i in range(num_norms):
            self.add_module(f'norm{i + 1}', nn.LayerNorm(channels))
        self.dropout = nn.Dropout(dropout)
        self.act = ACTIVATIONS[choose('act', act, tuple(ACTIVATIONS))]
        self.pre_norm = pre_norm

    def part(self, x: Tensor, norm: nn.Module, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """One shortcut: x + compute(norm(x)) or norm(x + compute(x))."""
        if self.pre_norm:
            return x + self.dropout(compute(norm(x)))
        return norm(x + self.dropout(compute(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.act(self.linear1(x))))


class EncoderLayer(Layer):
    """Self-attention of all cells; (B, N, C) -> (B, N, C)."""

    norm1: nn.Module
    norm2: nn.Module

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.0,
        act: str = 'relu',
        pre_norm: bool = False,
    ):
        super().__init__(channels=channels, hidden=hidden, num_norms=2, dropout=dropout, act=act, pre_norm=pre_norm)
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None = None) -> Tensor:
        """position (B or 1, N, C); padding (B, N) bool, True for cells that nothing looks at."""
        x = self.part(x, self.norm1, lambda y: attend(self.self_attn, y + position, y + position, y, padding))
        return self.part(x, self.norm2, self.feed_forward)


class DecoderLayer(Layer):
    """Self-attention of queries, then attention to all cells; (B, Q, C) -> (B, Q, C)."""

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.0,
        act: str = 'relu',
        pre_norm: bool = False,
    ):
        super().__init__(channels=channels, hidden=hidden, num_norms=3, dropout=dropout, act=act, pre_norm=pre_norm)
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)

    def forward(
        self, x: Tensor, place: Tensor, memory: Tensor, position: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """place (B or 1, Q, C) is the queries' position, position (B or 1, N, C) the memory's (B, N, C)."""
        x = self.part(x, self.norm1, lambda y: attend(self.self_attn, y + place, y + place, y))
        keys = memory + position
        x = self.part(x, self.norm2, lambda y: attend(self.multihead_attn, y + place, keys, memory, padding))
        return self.part(x, self.norm3, self.feed_forward)


class DeformableEncoderLayer(Layer):
    """Each cell looks at a few points of every level; (B, N, C) -> (B, N, C)."""

    norm1: nn.Module
    norm2: nn.Module

    def __init__(
        self,
        *,
        channels: int,
        num_levels: int,
        num_points: int = 4,
        num_heads: int = 8,
        hidden: int = 1024,
        dropout: float = 0.0,
        act: str = 'relu',
    ):
        super().__init__(channels=channels, hidden=hidden, num_norms=2, dropout=dropout, act=act, pre_norm=False)
        self.self_attn = DeformableAttention(
            channels=channels, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, shapes: Sequence[Size], padding: Tensor | None = None
    ) -> Tensor:
        """reference (B, N, L or 1, 2): where each cell lies, see DeformableAttention."""
        x = self.part(x, self.norm1, lambda y: self.self_attn(y + position, reference, y, shapes, padding))
        return self.part(x, self.norm2, self.feed_forward)


class DeformableDecoderLayer(Layer):
    """Self-attention of queries, then a few points of every level; (B, Q, C) -> (B, Q, C)."""

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module

    def __init__(
        self,
        *,
        channels: int,
        num_levels: int,
        num_points: int = 4,
        num_heads: int = 8,
        hidden: int = 1024,
        dropout: float = 0.0,
        act: str = 'relu',
    ):
        super().__init__(channels=channels, hidden=hidden, num_norms=3, dropout=dropout, act=act, pre_norm=False)
        self.self_attn = nn.MultiheadAttention(channels, num_heads, dropout, batch_first=True)
        self.cross_attn = DeformableAttention(
            channels=channels, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )

    def forward(
        self,
        x: Tensor,
        place: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Sequence[Size],
        padding: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> Tensor:
        """reference (B, Q, L or 1, 2 or 4); apart (Q, Q) bool, True where a query must not see another."""
        x = self.part(x, self.norm1, lambda y: attend(self.self_attn, y + place, y + place, y, apart=apart))
        x = self.part(x, self.norm2, lambda y: self.cross_attn(y + place, reference, memory, shapes, padding))
        return self.part(x, self.norm3, self.feed_forward)


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None = None,
    apart: Tensor | None = None,
) -> Tensor:
    return attention(query, key, value, key_padding_mask=padding, need_weights=False, attn_mask=apart)[0]


def sine_positions(
    height: int, width: int, channels: int, valid: Tensor | None, device: torch.device, offset: float = 0.0
) -> Tensor:
    """Positions of DETR: sines and cosines of the row, then of the column, over 2 pi of the valid part.

    Args:
        channels: C, a multiple of 4.
        valid: (B, 2) int, rows and columns that are not padding, or None.
        offset: added to row and column, which count from 1.

    Returns:
        (B, height * width, C) float32, B = 1 where nothing is padding.
    """
    halves = []
    for axis, length in enumerate((height, width)):
        line = torch.arange(1, length + 1, device=device, dtype=torch.float32)[None]
        last = line[:, -1:]
        if valid is not None:  # whatever stands in the padding: nothing looks there
            last = valid[:, axis : axis + 1].float()
        line = (line + offset) / (last + 1e-6) * (2 * math.pi)
        halves.append(waves(line, channels // 2))
    rows = halves[0][:, :, None].expand(-1, -1, width, -1)
    columns = halves[1][:, None].expand(-1, height, -1, -1)
    return torch.cat([rows, columns], -1).flatten(1, 2)


def waves(x: Tensor, channels: int) -> Tensor:
    """(...) -> (..., channels): sine and cosine in turn, of wavelengths from 2 pi to 2 pi 10000."""
    powers = torch.arange(0, channels, 2, device=x.device, dtype=torch.float32) / channels
    angles = x[..., None] / 10000**powers
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def valid_cells(sizes: Sequence[Size] | None, stride: int, shape: Size, device: torch.device) -> Tensor | None:
    """(B, 2) rows and columns of a map that lie on the valid part of each picture; None where all do."""
    if sizes is None:
        return None
    rows = [(min(-(-h // stride), shape[0]), min(-(-w // stride), shape[1])) for h, w in sizes]
    return None if all(row == tuple(shape) for row in rows) else torch.tensor(rows, device=device)


def padding_of(valid: Tensor | None, height: int, width: int) -> Tensor | None:
    """(B, 2) rows and columns -> (B, height * width) bool, True for cells beyond them."""
    if valid is None:
        return None
    row = torch.arange(height, device=valid.device) >= valid[:, :1]
    column = torch.arange(width, device=valid.device) >= valid[:, 1:]
    return (row[:, :, None] | column[:, None]).flatten(1)
