"""Deformable token merging: 2 x 2 positions become one, read where learned offsets say. LIT, arXiv 2105.14217.

out[i, j] = sum over u, v in {0, 1} of weight[u, v] x(2 i + u + dy[i, j, u, v], 2 j + v + dx[i, j, u, v]) + bias, where
x(y, x) between positions is bilinear and outside the map 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ...kernels.dispatch import select
from .grid import pad_bottom_right, to_first, to_last

OFFSET_LR_SCALE = 0.01  # the authors train the offsets' weights at a hundredth of the learning rate


class DeformableConv(nn.Module):
    """The formula above, with offsets by a convolution of the same kernel and stride; (B, C, H, W) -> (B, D, H', W').

    H' and W' are H // 2 and W // 2: the last row and column of odd maps are read by offsets alone.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        template = nn.Conv2d(in_dim, dim, 2, 2)
        self.weight, self.bias = template.weight, template.bias
        self.conv_offset = nn.Conv2d(in_dim, 8, 2, 2)
        self.reset_offset()

    def reset_offset(self) -> None:
        """Offsets 0: an ordinary convolution."""
        nn.init.zeros_(self.conv_offset.weight)
        if self.conv_offset.bias is not None:
            nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.conv_offset(x)
        chosen = select('deformable merging', None, {'torchvision': refuses_torchvision(x), 'torch': None})
        return (merge_torchvision if chosen == 'torchvision' else merge_reference)(x, offset, self.weight, self.bias)


class DeformableMerging(nn.Module):
    """Deformable convolution, batch norm, GELU; (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), D).

    Odd maps are padded below and to the right first; as samples outside the map are 0 too, this adds a row and a
    column and changes no other value.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.drops_border = True
        self.dconv = DeformableConv(in_dim, dim)
        self.norm_layer = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = to_first(x)
        if self.drops_border:
            x = pad_bottom_right(x, 2)
        return F.gelu(to_last(self.norm_layer(self.dconv(x))))


def merge_reference(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In plain PyTorch: the map is sampled at the moved positions, then an ordinary convolution.

    Args:
        x: (B, C, H, W).
        offset: (B, 8, H', W'), channels ordered (u, v, (dy, dx)).
        weight, bias: of the convolution, (D, C, 2, 2) and (D,).
    """
    B, _, H, W = x.shape
    rows, cols = offset.shape[-2:]
    move = offset.float().reshape(B, 2, 2, 2, rows, cols).permute(3, 0, 4, 1, 5, 2).reshape(2, B, 2 * rows, 2 * cols)
    row = torch.arange(2 * rows, device=x.device)[:, None] + move[0]
    column = torch.arange(2 * cols, device=x.device) + move[1]
    grid = torch.stack(((2 * column + 1) / W - 1, (2 * row + 1) / H - 1), -1)
    moved = F.grid_sample(x.float(), grid, mode='bilinear', padding_mode='zeros', align_corners=False).to(x.dtype)
    return F.conv2d(moved, weight, bias, 2)


def merge_torchvision(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same by torchvision's operator."""
    return deform_conv2d(x, offset, weight, bias, stride=2)


def refuses_torchvision(x: Tensor) -> str | None:
    """Why torchvision's operator does not take this call."""
    if torch.compiler.is_exporting():
        return 'exported programs hold PyTorch operators alone'
    if not x.is_cuda:
        return 'on a CPU it takes up to twice as long as sampling and convolution'
    return None
