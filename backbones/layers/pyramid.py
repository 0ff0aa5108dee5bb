"""The simple feature pyramid: maps of several strides from one map. ViTDet, arXiv 2203.16527.

Written from the paper. Differs: sizes are arbitrary, so maps are cut to ceil(image / stride), and positions that lack
neighbours for max pooling repeat their last row or column; strides follow from that of the one map; channels stay dim,
dim / 2 and dim / 4 unless `width` asks for the paper's 1x1 and 3x3 convolutions, which stand for a neck.
"""

# B batch, C channels, H W size of the one map, h w size of a level
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import ceil_div, to_first, to_last
from .linear import Linear
from .norm import norm_factory


class PyramidLevel(nn.Module):
    """One level: transposed convolutions, nothing, or max pooling, then a norm; (B, H, W, C) -> (B, h, w, `dim`).

    Args:
        in_dim: channels of the one map.
        stride: of the one map, in pixels of the image.
        target: of this level; stride times or divided by a power of two.
        width: channels after a 1x1 and a 3x3 convolution, each with a norm; None leaves the convolutions out.

    Attributes:
        dim: channels of the level.

    Raises:
        ValueError: target and stride do not fit.
    """

    def __init__(self, in_dim: int, *, stride: int, target: int, width: int | None = None):
        super().__init__()
        ratio = max(stride, target) // min(stride, target)
        if max(stride, target) % min(stride, target) or ratio & (ratio - 1):
            raise ValueError(f'target must be stride times or divided by a power of two, got {target=}, {stride=}')
        norm = norm_factory('layer')
        self.pool = ratio if target > stride else 1
        self.ups = nn.ModuleList()
        self.up_norms = nn.ModuleList()
        dim = in_dim
        steps = ratio.bit_length() - 1 if target < stride else 0
        for step in range(steps):
            self.ups.append(nn.ConvTranspose2d(dim, max(dim // 2, 1), 2, 2))
            dim = max(dim // 2, 1)
            if step < steps - 1:
                self.up_norms.append(norm(dim))
        if width is None:
            self.project, self.smooth = None, None
        else:
            self.project = Linear(dim, width, bias=False)
            self.project_norm = norm(width)
            self.smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
            dim = width
        self.norm = norm(dim)
        self.dim = dim

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The level's map, cut to `size` = (h, w)."""
        if self.pool > 1:
            x = max_pool(x, self.pool)
        for step, up in enumerate(self.ups):
            x = to_last(up(to_first(x)))
            if step < len(self.up_norms):
                x = F.gelu(self.up_norms[step](x))
        if self.project is not None and self.smooth is not None:
            x = self.project_norm(self.project(x))
            x = to_last(self.smooth(to_first(x)))
        return self.norm(x)[:, : size[0], : size[1]]


def max_pool(x: Tensor, factor: int) -> Tensor:
    """Largest values of factor x factor squares, (B, H, W, C) -> (B, ceil(H / factor), ceil(W / factor), C).

    Repeating the border instead of padding keeps -inf out of graphs, where it would spoil the scales of int8.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        blocks = ceil_div(size, factor)
        if not isinstance(size, int) or size % factor:
            index = torch.arange(blocks * factor, device=x.device).clamp_max(size - 1)
            x = x.index_select(axis, index)
        x = x.unflatten(axis, (blocks, factor)).amax(axis + 1)
    return x


def pyramid_strides(stride: int, wanted: tuple[int, ...] = (4, 8, 16, 32)) -> tuple[int, ...]:
    """Strides of the pyramid over a map of this stride: those wanted, if they are it times or divided by powers of two,
    else half the stride, the stride, twice and four times as much (patches of 14 pixels: 7, 14, 28, 56).

    Raises:
        ValueError: the stride is odd and no power of two.
    """
    if stride & (stride - 1) == 0:
        return wanted
    if stride % 2:
        raise ValueError(f'a pyramid needs patches of an even number of pixels, got {stride}')
    return stride // 2, stride, 2 * stride, 4 * stride
