"""Hyena N-D: Multi-Dimensional Hyena for Spatial Inductive Bias, arXiv 2309.13600.

Written from the paper and the facts of the authors' code, https://github.com/Itamarzimm/HyenaND (Apache-2.0), which has
the layer inside DeiT; no weights were published. The layer is as theirs with two gates (their order 2): projection to
three maps, 3x3 depthwise convolution, a gate, a long convolution whose filter a small network makes from the position
and an exponential window fades out, a gate, projection. Differs:
- their layer takes one square size; here positions are measured in the map that the layer is made for (`grid`), so that
  filters keep their size in pixels and go on, fading, on larger maps;
- their position features are parameters that start as sines and hardly move (learning rate 1e-5): here they are fixed;
- their four-direction mode convolves four flipped copies and mixes the results linearly: here the filter's four flipped
  copies are mixed, which is the same with one convolution;
- dropout, more than two gates, directions in parallel channels, and learned or no windows are left out.
The paper puts the layer into Swin too; that code was not published: `hyena_tiny` is Swin-T with this layer for window
attention in all blocks, and its parameters are ours.
"""

# B batch, C channels, H W size of the current stage, F width of the filter's network
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import long_convolution
from .layers import mixer
from .layers.grid import to_first
from .layers.linear import Linear
from .layers.lookup import choose
from .registry import register, weights
from .swin import Swin

_DIRECTIONS = {'forward': 1, 'backward': 1, 'four': 4}
_FILTERS = ('joint', 'product')


class Sine(nn.Module):
    """sin(freq * x) with a learnable frequency per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.freq = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class FilterNetwork(nn.Sequential):
    """From features of positions (..., inputs) to filters (..., C); its three sines share their frequencies."""

    def __init__(self, inputs: int, width: int, dim: int):
        act = Sine(width)
        super().__init__(
            Linear(inputs, width),
            act,
            Linear(width, width),
            act,
            Linear(width, width),
            act,
            Linear(width, dim, bias=False),
        )


class ImplicitFilter(nn.Module):
    """filter[u, v, c] for offsets u, v >= 0: a network of the position times exp(-decay[c] * (u / G + v / G')).

    Args:
        dim: channels.
        grid: (G, G') positions that count as one unit of length.
        width: of the network.
        kind: 'joint': one network of both coordinates; 'product': the product of a network of each.
    """

    decay: Tensor

    def __init__(self, dim: int, *, grid: tuple[int, int], width: int, kind: str):
        super().__init__()
        self.grid, self.kind = grid, kind
        if kind == 'joint':
            self.network = FilterNetwork(6, width, dim)
        else:
            self.rows, self.columns = FilterNetwork(3, width, dim), FilterNetwork(3, width, dim)
        # channels fade to 1% after 1.5 units of length down to 0.3
        decay = torch.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, dim)
        self.register_buffer('decay', decay, persistent=False)

    def forward(self, height: int, width: int) -> Tensor:
        """(height, width, C)"""
        y, rows = self._features(height, self.grid[0])
        x, columns = self._features(width, self.grid[1])
        if self.kind == 'joint':
            both = (rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1))
            filters = self.network(torch.cat(both, -1))
        else:
            filters = self.rows(rows)[:, None] * self.columns(columns)
        return filters * (torch.exp(-y * self.decay)[:, None] * torch.exp(-x * self.decay))

    def _features(self, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Coordinates (size, 1), one at position length - 1, and features (size, 3)."""
        position = torch.arange(size, device=self.decay.device, dtype=self.decay.dtype)[:, None]
        coordinate = position / (length - 1)
        angle = position * (2 * math.pi * 1e-4 / length)
        return coordinate, torch.cat((coordinate, angle.cos(), -angle.sin()), 1)


@mixer('hyena')
class Hyena(nn.Module):
    """out = proj(x0 * long convolution of (x1 * v)), where x0, x1, v are 3x3 convolutions of projections.

    Args:
        dim: channels.
        grid: (H, W), at least 2, of the map that the layer is made for: positions are measured in it; 14 x 14 if None.
        filter_width: width of the network that makes the filter.
        filters: 'joint': one network of both coordinates; 'product': the product of a network of each.
        direction: what a position sees: 'forward' those above and to the left, 'backward' those below and to the
            right, 'four' all quadrants, by learned factors of the four flipped filters.
    """

    last_linear: ClassVar[str] = 'out_proj'

    def __init__(
        self,
        *,
        dim: int,
        grid: tuple[int, int] | None = None,
        filter_width: int = 64,
        filters: str = 'joint',
        direction: str = 'four',
    ):
        super().__init__()
        choose('direction', direction, _DIRECTIONS)
        choose('filters', filters, dict.fromkeys(_FILTERS))
        height, width = grid if grid is not None else (14, 14)
        grid = max(height, 2), max(width, 2)
        self.direction = direction
        self.in_proj = Linear(dim, 3 * dim)
        self.short_filter = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.filter = ImplicitFilter(dim, grid=grid, width=filter_width, kind=filters)
        self.bias = nn.Parameter(torch.randn(dim))
        self.linear_mix = Linear(4, 1) if direction == 'four' else None
        self.out_proj = Linear(dim, dim)
        self.scale = 0.5 / math.sqrt(grid[0] * grid[1])  # the authors' transform divides by its size, twice the map's

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        x = self.short_filter(to_first(self.in_proj(x))).permute(0, 2, 3, 1)
        gate, inner, value = x.chunk(3, -1)
        out = long_convolution(inner * value, self.filters(H, W)) * gate
        if self.linear_mix is not None:
            out = out + self.linear_mix.bias
        return self.out_proj(out)

    def filters(self, height: int, width: int) -> Tensor:
        """The filter for every offset, (2 height - 1, 2 width - 1, C); a position's own factor is in the middle."""
        quadrant = self.filter(height, width) * self.scale
        y, x = (torch.arange(1 - size, size, device=quadrant.device) for size in (height, width))
        # Four flipped copies, padded to one size and summed, are one reflected copy times the factors of its parts.
        # TensorRT can build this one for maps of any size: all shapes come from y and x.
        above, below, left, right = (y >= 0)[:, None], (y <= 0)[:, None], x >= 0, x <= 0
        parts = (above & left, below & right, above & right, below & left)
        if self.linear_mix is None:
            factor = parts[0 if self.direction == 'forward' else 1].to(quadrant.dtype)
        else:
            factor = sum(weight * part for weight, part in zip(self.linear_mix.weight[0], parts))  # type: ignore[assignment]
        own = (parts[0] & parts[1])[..., None] * self.bias
        return (quadrant[y.abs()][:, x.abs()] + own) * factor[..., None]

    def extra_repr(self) -> str:
        return f'direction={self.direction!r}'


class HyenaSwin(Swin):
    """Swin with long convolutions in place of window attention; arguments of windows and heads are without effect."""

    has_golden = False
    reduced: ClassVar[dict[str, Any]] = {'depths': (1, 1, 2, 1), 'dims': (16, 24, 32, 40)}

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if '.filter.' in name}


register(
    'hyena_tiny',
    HyenaSwin,
    depths=(2, 2, 6, 2),
    dims=(96, 192, 384, 768),
    mixers='hyena',
    always_shift=True,
    drop_path=0.2,
    weights=[
        weights(
            'untrained',
            None,
            top1=None,
            params=28.8,
            macs=None,
            paper='https://arxiv.org/abs/2309.13600',
            origin='https://github.com/Itamarzimm/HyenaND',
        )
    ],
)
