"""RT-DETR's hybrid encoder (Zhao et al. 2023, arXiv:2304.08069): attention within the coarsest map (AIFI), then
convolutional fusion of neighbouring maps, downwards and upwards (CCFF). A neck.

Written from the paper; parameters are called as in the authors' PyTorch code (lyuwenyu/RT-DETR, Apache-2.0, encoder).
Differs: positions follow rows and columns on maps that are not square (there they are transposed); any strides.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .detr import Stack, check_width
from .pyramid import FeatureInfo, PyramidInfo, Size, positive
from .transformer import EncoderLayer

# B batch, C width, h w size of a map


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, SiLU unless act=False; (B, C, h, w) -> (B, C', ceil(h / stride), ...)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, *, stride: int = 1, act: bool = True):
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
            norm=nn.BatchNorm2d(channels),
        )
        if act:
            parts['act'] = nn.SiLU()
        super().__init__(parts)


class RepBlock(nn.Module):
    """silu(3x3 + 1x1), each with batch norm (RepVGG, arXiv:2101.03697): one convolution once trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, act=False)
        self.conv2 = ConvNorm(channels, channels, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv1(x) + self.conv2(x))

    def for_deploy(self) -> nn.Sequential:
        """The one convolution and SiLU that replace the block in evaluation mode."""
        wide, narrow = (_folded(branch) for branch in (self.conv1, self.conv2))
        assert wide.bias is not None and narrow.bias is not None
        wide.weight.data += F.pad(narrow.weight.data, (1, 1, 1, 1))
        wide.bias.data += narrow.bias.data
        return nn.Sequential(wide, nn.SiLU())


class CSPBlock(nn.Module):
    """Two 1x1 branches, one of them through `depth` RepBlocks, summed; width `expansion` of the output's inside."""

    def __init__(self, in_channels: int, channels: int, *, depth: int, expansion: float):
        super().__init__()
        inside = positive('expansion * channels', int(channels * expansion))
        self.conv1 = ConvNorm(in_channels, inside, 1)
        self.conv2 = ConvNorm(in_channels, inside, 1)
        self.bottlenecks = nn.Sequential(*[RepBlock(inside) for _ in range(depth)])
        self.conv3 = ConvNorm(inside, channels, 1) if inside != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class HybridEncoder(nn.Module):
    """List of maps -> as many maps of one width, finest first.

    Args:
        feature_info: channels and strides of the incoming maps.
        out_channels: C, width of every outgoing map; a multiple of 4 and of num_heads.
        encoder_layers: of attention within the coarsest map; 0 leaves it out.
        num_heads, hidden, dropout: of these layers.
        depth: RepBlocks of each fusion.
        expansion: their width, as a fraction of C.

    `feature_info` describes the outgoing maps.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        out_channels: int = 256,
        encoder_layers: int = 1,
        num_heads: int = 8,
        hidden: int = 1024,
        dropout: float = 0.0,
        depth: int = 3,
        expansion: float = 1.0,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        check_width(out_channels, num_heads)
        strides, steps = self.inputs.reduction(), len(self.inputs) - 1
        self.feature_info = PyramidInfo([out_channels] * len(strides), strides)
        # Where strides double, a convolution of stride 2 gives the next map's size; elsewhere it is resampled to it.
        self.doubles = [b == 2 * a for a, b in pairwise(strides)]
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
            for width in self.inputs.channels()
        )
        attention = [
            EncoderLayer(channels=out_channels, num_heads=num_heads, hidden=hidden, dropout=dropout, act='gelu')
            for _ in range(encoder_layers)
        ]
        self.encoder = nn.ModuleList([Stack(attention, None)] if attention else [])
        self.lateral_convs = nn.ModuleList(ConvNorm(out_channels, out_channels, 1) for _ in range(steps))
        self.fpn_blocks = nn.ModuleList(
            CSPBlock(2 * out_channels, out_channels, depth=depth, expansion=expansion) for _ in range(steps)
        )
        self.downsample_convs = nn.ModuleList(ConvNorm(out_channels, out_channels, 3, stride=2) for _ in range(steps))
        self.pan_blocks = nn.ModuleList(
            CSPBlock(2 * out_channels, out_channels, depth=depth, expansion=expansion) for _ in range(steps)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        self.inputs.check(features)
        maps = [project(x) for project, x in zip(self.input_proj, features)]
        if len(self.encoder):
            maps[-1] = self._attend(maps[-1])
        coarse = maps[-1]
        downwards: list[Tensor] = []
        for lateral, fuse, finer in zip(self.lateral_convs, self.fpn_blocks, reversed(maps[:-1])):
            coarse = lateral(coarse)
            downwards.append(coarse)
            coarse = fuse(torch.cat([F.interpolate(coarse, size=finer.shape[-2:]), finer], 1))
        outputs = [coarse]
        for i, coarser in enumerate(reversed(downwards)):
            fine = self.downsample_convs[i](outputs[-1])
            if not self.doubles[i]:
                fine = F.interpolate(fine, size=coarser.shape[-2:])
            outputs.append(self.pan_blocks[i](torch.cat([fine, coarser], 1)))
        return outputs

    def _attend(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        position = grid_waves(size, x.shape[1], x.device).to(x.dtype)
        cells = x.flatten(2).transpose(1, 2)
        for layer in self.encoder[0].layers:  # type: ignore[union-attr]
            cells = layer(cells, position)
        return cells.transpose(1, 2).unflatten(2, size)


def grid_waves(size: Size, channels: int, device: torch.device) -> Tensor:
    """(1, h * w, C): sines and cosines of the row, then of the column, in cells; wavelengths 2 pi to 2 pi 10000."""
    quarter = channels // 4
    speed = 1 / 10000 ** (torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = (torch.arange(n, device=device, dtype=torch.float32)[:, None] * speed for n in size)
    rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, size[1], -1)
    columns = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(size[0], -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)[None]


def _folded(branch: nn.Sequential) -> nn.Conv2d:
    """A copy of a branch as one convolution with bias; its norm may be folded already."""
    conv, norm = branch[0], branch[1]
    assert isinstance(conv, nn.Conv2d)
    if isinstance(norm, nn.BatchNorm2d):
        return fuse_conv_bn_eval(conv, norm)
    return conv
