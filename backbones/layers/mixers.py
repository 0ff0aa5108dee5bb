"""Token mixers: plain modules (B, H, W, C) -> (B, H, W, C), built by name and usable in every family.

A mixer takes `dim` and keyword options; one whose parameters depend on the size of its map also takes `grid`, (H, W).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import pool_mixer
from .grid import to_first
from .linear import Linear
from .lookup import choose, nearest
from .mlp import ACTIVATIONS

MIXERS: dict[str, Callable[..., nn.Module]] = {}


def mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: makes a mixer available to every family under `name`."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        if name in MIXERS:
            raise ValueError(f'mixer {name!r} is already registered by {MIXERS[name]!r}')
        MIXERS[name] = cls
        return cls

    return add


def build_mixer(spec: str | Mapping[str, Any], *, dim: int, grid: tuple[int, int] | None = None) -> nn.Module:
    """A mixer from its name, or from dict(name=..., option=...).

    Args:
        dim: channels.
        grid: (H, W) of the map, for mixers whose parameters depend on it.

    Raises:
        ValueError: no mixer has this name.  TypeError: it has no such option.
    """
    options = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else options.pop('name', None)
    make = choose('mixer', name, MIXERS)
    accepted = inspect.signature(make).parameters
    for option in options:
        if option not in accepted or option in ('dim', 'grid'):
            names = [key for key in accepted if key not in ('dim', 'grid')]
            raise TypeError(
                f'mixer {name!r} has no option {option!r}{nearest(option, names)}; it has {", ".join(names) or "none"}'
            )
    if 'grid' in accepted:
        options['grid'] = grid
    return make(dim=dim, **options)


@mixer('identity')
class IdentityMixer(nn.Module):
    """Mixes nothing."""

    def __init__(self, *, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


@mixer('pool')
class PoolMixer(nn.Module):
    """Average over a window minus the input. PoolFormer, arXiv 2111.11418."""

    def __init__(self, *, dim: int, pool_size: int = 3):
        super().__init__()
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        return pool_mixer(x, self.pool_size)

    def extra_repr(self) -> str:
        return f'pool_size={self.pool_size}'


@mixer('random')
class RandomMixer(nn.Module):
    """out[m] = sum over n of R[m, n] * x[n], R random, row-stochastic, never trained. RandFormer, arXiv 2210.13452."""

    def __init__(self, *, dim: int, grid: tuple[int, int] | None):
        super().__init__()
        if grid is None:
            raise ValueError("mixer 'random' needs the size of its map; pass img_size to the model")
        self.grid = grid
        tokens = grid[0] * grid[1]
        self.random_matrix = nn.Parameter(torch.softmax(torch.rand(tokens, tokens), dim=-1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:3]) != self.grid:
            raise ValueError(f'the random matrix was made for a map of {self.grid}, got {tuple(x.shape[1:3])}')
        return torch.matmul(self.random_matrix, x.flatten(1, 2)).reshape(x.shape)


@mixer('conv')
class SepConv(nn.Module):
    """Inverted separable convolution: widen, activate, depthwise convolution, narrow. ConvFormer, arXiv 2210.13452."""

    last_linear: ClassVar[str] = 'pwconv2'

    def __init__(
        self, *, dim: int, expansion: float = 2.0, kernel: int = 7, act: str = 'star_relu', bias: bool = False
    ):
        super().__init__()
        wide = int(dim * expansion)
        self.pwconv1 = Linear(dim, wide, bias=bias)
        self.act1 = choose('act', act, ACTIVATIONS)()
        self.dwconv = nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=bias)
        self.pwconv2 = Linear(wide, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.pwconv1(x))
        return self.pwconv2(self.dwconv(to_first(x)).permute(0, 2, 3, 1))


@mixer('attention')
class Attention(nn.Module):
    """Self-attention between all positions, without position encoding; dim // head_dim heads, at least one."""

    first_linears: ClassVar[tuple[str, ...]] = ('qkv',)
    last_linear: ClassVar[str] = 'proj'

    def __init__(self, *, dim: int, head_dim: int = 32, bias: bool = False):
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = max(dim // head_dim, 1)
        inner = self.num_heads * head_dim
        self.qkv = Linear(dim, 3 * inner, bias=bias)
        self.proj = Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(B, H, W, self.num_heads * self.head_dim))
