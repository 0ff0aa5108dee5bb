"""MANO: Linear Attention with Global Context: A Multipole Attention Mechanism for Vision and Physics, arXiv 2507.02748.

Written from the paper's description and the facts of public copies of the authors' module for physics; their own
repository, https://github.com/AlexColagrande/MANO, could not be read, so its licence is not known to us, and there are
no recorded outputs to compare with.

From the paper and the module: attention within windows runs on the map and on ever coarser copies of it, with the same
weights at all levels; a strided convolution makes the next copy, a transposed one brings its result back, both without
bias and shared by all levels; results are added from the coarsest level up, with the factors 1, 1/2, 1/3, ... Each head
sees the whole map at linear cost. For images the paper puts this into Swin in place of (shifted) window attention.

Our reading:
- `mano_tiny`, `mano_small` and `mano_base` are Swin-T, -S and -B with multipole attention in all blocks. Attention is
  Swin's without shifts, with its bias per offset, which all levels share, so that Swin's weights fit (strict=False).
- stages have 4, 3, 2 and 1 levels: at 224 pixels the coarsest copy is one window of 7 x 7.
- the module normalises each level; a block of Swin normalises before, and levels are taken as they are.
- any size: copies are ceil(H / 2) x ceil(W / 2), and positions outside the map are not attended to.
The figures of parameters are ours.
"""

# B batch, C channels, H W size of the current stage, h heads
from typing import Any, ClassVar

from torch import Tensor, nn

from ..kernels import window_attention
from .layers import RelativePositionBias, mixer
from .layers.grid import pad_bottom_right, to_first, to_last
from .layers.linear import Linear
from .registry import register, weights
from .swin import Swin


@mixer('multipole')
class MultipoleAttention(nn.Module):
    """Window attention on the map and on coarser copies of it, with shared weights.

    Args:
        dim: channels.
        num_heads: divides dim; dim // 32 if None, at least 1.
        window_size: side of the windows at every level.
        levels: the map itself and levels - 1 copies, each of half the height and width of the one before.
        qkv_bias: learn a bias of queries, keys and values.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        window_size: int = 7,
        levels: int = 3,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads if num_heads is not None else max(dim // 32, 1)
        if self.num_heads < 1 or dim % self.num_heads:
            raise ValueError(f'num_heads must divide dim, got num_heads={self.num_heads}, {dim=}')
        if levels < 1 or window_size < 1:
            raise ValueError(f'levels and window_size must be positive, got {levels=}, {window_size=}')
        self.window_size, self.levels = window_size, levels
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.position_bias = RelativePositionBias(window_size, self.num_heads)
        self.proj = Linear(dim, dim)
        if levels > 1:
            self.down = nn.Conv2d(dim, dim, 2, 2, bias=False)
            self.up = nn.ConvTranspose2d(dim, dim, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        while len(maps) < self.levels:
            maps.append(to_last(self.down(pad_bottom_right(to_first(maps[-1]), 2))))
        bias = self.position_bias()
        out = self._attend(maps.pop(), bias)
        for step, finer in enumerate(reversed(maps), 1):
            _, H, W, _ = finer.shape
            raised = self.up(to_first(out)).permute(0, 2, 3, 1).narrow(1, 0, H).narrow(2, 0, W)
            out = self._attend(finer, bias).add(raised, alpha=1 / step)
        return out

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.proj(window_attention(self.qkv(x), self.window_size, heads=self.num_heads, bias=bias))

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}, levels={self.levels}'


class Mano(Swin):
    """Swin with multipole attention in all blocks; give the levels of each stage with the mixers."""

    has_golden = False
    reduced: ClassVar[dict[str, Any]] = {
        **Swin.reduced,
        'window_size': (2, 2, 2, 2),
        'mixers': tuple({'name': 'multipole', 'levels': levels} for levels in (3, 2, 1, 1)),
    }

    @property
    def min_dynamic_size(self) -> int:  # type: ignore[override]
        """From here on the coarsest level of every stage has more than one window."""
        stages: Any = self.stages
        mixers = [(stride, stage[0].token_mixer) for stride, stage in zip(self.strides, stages)]
        return 1 + max(
            stride * 2 ** (mixer.levels - 1) * mixer.window_size if isinstance(mixer, MultipoleAttention) else stride
            for stride, mixer in mixers
        )


_LEVELS = tuple({'name': 'multipole', 'levels': levels} for levels in (4, 3, 2, 1))
_PAPER: dict[str, Any] = {
    'top1': None,
    'macs': None,
    'paper': 'https://arxiv.org/abs/2507.02748',
    'origin': 'https://github.com/AlexColagrande/MANO',
    'licence': 'unknown',
}

register(
    'mano_tiny',
    Mano,
    depths=(2, 2, 6, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    mixers=_LEVELS,
    always_shift=True,
    drop_path=0.2,
    weights=[weights('untrained', None, params=36.1, **_PAPER)],
)
register(
    'mano_small',
    Mano,
    depths=(2, 2, 18, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    mixers=_LEVELS,
    always_shift=True,
    drop_path=0.3,
    weights=[weights('untrained', None, params=71.6, **_PAPER)],
)
register(
    'mano_base',
    Mano,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    mixers=_LEVELS,
    always_shift=True,
    drop_path=0.5,
    weights=[weights('untrained', None, params=126.8, **_PAPER)],
)
