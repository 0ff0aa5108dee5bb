"""Multi-scale deformable attention (Zhu et al. 2020, Deformable DETR, arXiv:2010.04159), by grid_sample alone.

    out_q = W sum_h sum_l sum_p A_hqlp V_h(memory_l at reference_q + offset_hqlp),  softmax of A over l and p together

Written from the paper; names of parameters and the initialisation are those of the authors' MSDeformAttn
(fundamentalvision/Deformable-DETR, Apache-2.0), so that published weights load. No operator is compiled: bilinear
interpolation with zeros outside is `grid_sample`, which ONNX and TensorRT have too.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pyramid import Size, positive

# B batch, Q queries, N cells of all levels, C width, h heads, d head width, L levels, P points


def sample_levels(value: Tensor, shapes: Sequence[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of values at sampled places.

    Args:
        value: (B, N, h, d), the cells of all levels one after the other, each level row by row.
        shapes: (height, width) of each level; their products sum to N.
        locations: (B, Q, h, L, P, 2), x and y from 0 (left or upper border) to 1; outside lie zeros.
        weights: (B, Q, h, L, P).

    Returns:
        (B, Q, h * d).
    """
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grid = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B h, Q, P, 2)
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, B h, 1, Q, P)
    out: Tensor | None = None
    for level, (x, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes)):
        x = x.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
        taken = F.grid_sample(x, grid[level].to(x.dtype), align_corners=False)  # (B h, d, Q, P)
        # Summed level by level: all levels side by side would be L times the memory.
        part = (taken * weights[level].to(taken.dtype)).sum(-1)
        out = part if out is None else out + part
    assert out is not None
    return out.view(batch, heads * width, queries).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Attention that reads, for each query and head, a few points of each level around a reference.

    Args:
        channels: C, of queries and memory.
        num_heads: h, a divisor of C.
        num_levels: L.
        num_points: P, points of each level.
    """

    def __init__(self, *, channels: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4):
        super().__init__()
        if channels % positive('num_heads', num_heads):
            raise ValueError(f'channels must be a multiple of num_heads={num_heads}, got {channels}')
        self.num_heads = num_heads
        self.num_levels = positive('num_levels', num_levels)
        self.num_points = positive('num_points', num_points)
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, points * 2)
        self.attention_weights = nn.Linear(channels, points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: each head looks in a direction of its own, its points 1, 2, ... cells away, of equal weight."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1.0)
        bias = direction[:, None, None] * distance[:, None]  # (h, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Sequence[Size],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Queries (B, Q, C) that look at the memory -> (B, Q, C).

        Args:
            query: (B, Q, C), with its position added.
            reference: (B, Q, L or 1, 2) points, or (B, Q, L or 1, 4) boxes (centre x, centre y, width, height), as
                fractions of each level's map. Offsets count in cells from a point, in half widths / P from a box.
            memory: (B, N, C), the cells of all levels one after the other.
            shapes: (height, width) of each level.
            padding: (B, N) bool, True where a cell is padding: its value counts as zero.
        """
        if len(shapes) != self.num_levels:
            raise ValueError(f'shapes needs one (height, width) for each of {self.num_levels} levels, got {shapes}')
        batch, queries, _ = query.shape
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        split = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*split, 2)
        weights = self.attention_weights(query).view(*split[:3], -1).softmax(-1).view(split)
        centre = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:
            # Sizes as plain numbers, not as a tensor of shapes: nothing is copied to the device, and it exports.
            x = torch.stack([offsets[..., level, :, 0] / w for level, (_, w) in enumerate(shapes)], 3)
            y = torch.stack([offsets[..., level, :, 1] / h for level, (h, _) in enumerate(shapes)], 3)
            offsets = torch.stack([x, y], -1)
        else:
            offsets = offsets / self.num_points * reference[:, :, None, :, None, 2:] * 0.5
        return self.output_proj(sample_levels(value, shapes, centre + offsets, weights))
