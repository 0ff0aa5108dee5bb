"""The pixel decoder of kMaX-DeepLab (Yu et al. 2022, arXiv:2207.04044): axial attention (Wang et al. 2020,
arXiv:2003.07853) on the coarse maps, bottlenecks on the fine ones, coarse to fine.

Written from the papers and from facts of bytedance/kmax-deeplab (Apache 2.0). Differs: relative distances beyond the
254 of the published tables take the last entry, so maps may be of any size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_tf_
from torch import Tensor, nn

from .pyramid import FeatureInfo, PyramidInfo, choose
from .universal import at_least_float32

# B batch, C channels, H W size of a map, L length of one axis, h heads, d head width

SPAN = 255  # positions that the tables of relative distances tell apart in either direction


class ConvNorm(nn.Module):
    """Convolution, batch norm (TensorFlow's eps 1e-3, momentum 0.01), GELU; of one (B, C, L) or two (B, C, H, W) axes.

    Args:
        axes: 1 or 2.
        std: of the truncated normal initialisation; default sqrt(2 / in_channels), Xavier for depthwise kernels.
        gain: initial scale of the norm; 0 starts a residual branch as nothing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        *,
        axes: int = 2,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = False,
        std: float | None = None,
        gain: float = 1.0,
    ):
        super().__init__()
        kind = nn.Conv2d if axes == 2 else nn.Conv1d
        self.conv = kind(
            in_channels,
            out_channels,
            kernel,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.norm = batch_norm(out_channels, axes) if norm else nn.Identity()
        self.act = nn.GELU() if act else nn.Identity()
        if groups > 1:
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            trunc_normal_tf_(self.conv.weight, std=math.sqrt(2 / in_channels) if std is None else std)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        if norm:
            nn.init.constant_(self.norm.get_parameter('weight'), gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def batch_norm(channels: int, axes: int = 2) -> nn.Module:
    """Batch norm with TensorFlow's numbers."""
    return (nn.BatchNorm2d if axes == 2 else nn.BatchNorm1d)(channels, eps=1e-3, momentum=0.01)


class RelativeTable(nn.Module):
    """One vector per distance key - query along an axis."""

    def __init__(self, depth: int):
        super().__init__()
        self.embeddings = nn.Embedding(2 * SPAN - 1, depth)
        trunc_normal_tf_(self.embeddings.weight, std=1.0)

    def forward(self, length: int) -> Tensor:
        """(L, L, d): row query, column key."""
        position = torch.arange(length, device=self.embeddings.weight.device)
        distance = (position[None] - position[:, None]).clamp(1 - SPAN, SPAN - 1)
        return self.embeddings(distance + SPAN - 1)


class AxialAttention(nn.Module):
    """Self-attention along one axis with relative positions in the queries, the keys and the values.

    Scores are the normalised sum of q.k, q.r_q and k.r_k (no 1/sqrt(d): the norm scales), outputs that of the attended
    values and the attended r_v. (N, C, L) -> (N, value_depth, L).
    """

    def __init__(self, channels: int, *, key_depth: int, value_depth: int, num_heads: int):
        super().__init__()
        self.depths = (key_depth, key_depth, value_depth)
        self.num_heads = num_heads
        width = 2 * key_depth + value_depth
        self.qkv_transform = ConvNorm(channels, width, axes=1, norm=False, std=channels**-0.5)
        self.query_rpe = RelativeTable(key_depth // num_heads)
        self.key_rpe = RelativeTable(key_depth // num_heads)
        self.value_rpe = RelativeTable(value_depth // num_heads)
        self.batch_norm_qkv = batch_norm(width, 1)
        self.batch_norm_similarity = batch_norm(3 * num_heads)
        self.batch_norm_retrieved_output = batch_norm(2 * value_depth, 1)

    def forward(self, x: Tensor) -> Tensor:
        length, heads = x.shape[-1], self.num_heads
        query, key, value = (
            part.unflatten(1, (heads, -1))  # (N, h, d, L)
            for part in self.batch_norm_qkv(self.qkv_transform(x)).split(self.depths, 1)
        )
        scores = torch.cat(
            [
                query.transpose(2, 3) @ key,
                torch.einsum('nhdq,qkd->nhqk', query, self.query_rpe(length)),
                torch.einsum('nhdk,qkd->nhqk', key, self.key_rpe(length)),
            ],
            1,
        )
        scores = self.batch_norm_similarity(scores).unflatten(1, (3, heads)).sum(1)
        weights = at_least_float32(scores).softmax(-1).to(value.dtype)
        content = value @ weights.transpose(2, 3)
        position = torch.einsum('nhqk,qkd->nhdq', weights, self.value_rpe(length))
        out = self.batch_norm_retrieved_output(torch.cat([content, position], 1).flatten(1, 2))
        return out.unflatten(1, (2, -1)).sum(1)


class AxialAttention2d(nn.Module):
    """Along the height, then along the width: (B, C, H, W) -> (B, value_expansion * channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, *, num_heads: int = 8, value_expansion: int = 2):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f'channels of axial attention must be a multiple of {num_heads=}, got {channels=}')
        depths = {'key_depth': channels, 'value_depth': value_expansion * channels, 'num_heads': num_heads}
        self.height_axis = AxialAttention(in_channels, **depths)
        self.width_axis = AxialAttention(depths['value_depth'], **depths)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = self.height_axis(x.permute(0, 3, 1, 2).flatten(0, 1)).unflatten(0, (batch, width))  # (B, W, C, H)
        x = self.width_axis(x.permute(0, 3, 2, 1).flatten(0, 1)).unflatten(0, (batch, height))  # (B, H, C, W)
        return x.permute(0, 2, 1, 3)


class Block(nn.Module):
    """GELU, then a residual branch: 1x1, axial attention or a 3x3 convolution, 1x1; the shortcut starts at the GELU."""

    def __init__(self, in_channels: int, channels: int, *, kind: str, drop_path: float):
        super().__init__()
        axial = kind == 'axial'
        middle = 2 * channels if axial else channels
        self.shortcut = ConvNorm(in_channels, 4 * channels) if in_channels != 4 * channels else nn.Identity()
        self.conv1_bn_act = ConvNorm(in_channels, middle, act=True)
        if axial:
            self.attention = AxialAttention2d(middle, channels)
        else:
            self.conv2_bn_act = ConvNorm(middle, channels, 3, act=True)
        self.axial = axial
        self.conv3_bn = ConvNorm(middle, 4 * channels, gain=0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        y = self.conv1_bn_act(x)
        y = F.gelu(self.attention(y)) if self.axial else self.conv2_bn_act(y)
        return self.shortcut(x) + self.drop_path(self.conv3_bn(y))


class BlockGroup(nn.Module):
    """Blocks of one stage: (B, C, H, W) -> (B, 4 * channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, *, depth: int, kind: str, drop_path: float):
        super().__init__()
        self.blocks = nn.Sequential(
            *(Block(in_channels if i == 0 else 4 * channels, channels, kind=kind, drop_path=drop_path)
              for i in range(depth))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ResizedFuse(nn.Module):
    """A coarse map brought to the finer one's size and width, and added to it."""

    def __init__(self, low_channels: int, high_channels: int, channels: int, align_corners: bool | None):
        super().__init__()
        self.align_corners = align_corners
        self.conv_bn_low = ConvNorm(low_channels, channels) if low_channels != channels else None
        self.conv_bn_high = ConvNorm(high_channels, channels) if high_channels != channels else None

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        aligned = corners(low, self.align_corners)
        if self.conv_bn_low is not None:
            low = self.conv_bn_low(F.gelu(low))
        if self.conv_bn_high is not None:
            high = self.conv_bn_high(F.gelu(high))
        return F.interpolate(low, size=high.shape[-2:], mode='bilinear', align_corners=aligned) + high


def corners(x: Tensor, align_corners: bool | None) -> bool:
    """The published rule where nothing is said: corners are aligned on maps of odd width (pictures of 32 k + 1)."""
    return x.shape[-1] % 2 == 1 if align_corners is None else align_corners


class KMaXPixelDecoder(nn.Module):
    """Maps of a backbone -> decoded maps, both coarse to fine inside, handed over finest first.

    Args:
        feature_info: channels and strides of the maps, finest first; at least two.
        depths, channels, kinds: blocks, width (an output has four times as many channels) and 'axial' or 'bottleneck'
            of each stage, COARSEST FIRST as the authors write them.
        drop_path: rate of the residual branches.
        align_corners: of the interpolations; None: the published rule, by the parity of the width. Exports with a
            dynamic size need True or False.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        depths: Sequence[int] = (1, 5, 1, 1),
        channels: Sequence[int] = (512, 256, 128, 64),
        kinds: Sequence[str] = ('axial', 'axial', 'bottleneck', 'bottleneck'),
        drop_path: float = 0.0,
        align_corners: bool | None = None,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        levels = len(self.inputs)
        if levels < 2 or not len(depths) == len(channels) == len(kinds) == levels:
            raise ValueError(
                f'the pixel decoder needs two maps or more and depths, channels and kinds for each, got {levels} maps, '
                f'depths={tuple(depths)}, channels={tuple(channels)}, kinds={tuple(kinds)}'
            )
        widths = self.inputs.channels()[::-1]
        self.in_norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in widths)
        self.stages, self.resized_fuses = nn.ModuleList(), nn.ModuleList()
        for i in range(levels):
            choose('kinds', kinds[i], ('axial', 'bottleneck'))
            self.stages.append(
                BlockGroup(
                    widths[0] if i == 0 else channels[i],
                    channels[i],
                    depth=depths[i],
                    kind=kinds[i],
                    drop_path=drop_path,
                )
            )
            if i > 0:
                self.resized_fuses.append(ResizedFuse(4 * channels[i - 1], widths[i], channels[i], align_corners))
        self.out_channels = [4 * c for c in channels][::-1]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps finest first -> as many, of four times `channels`, finest first."""
        maps = [norm(f) for norm, f in zip(self.in_norms, reversed(features), strict=True)]
        out = [self.stages[0](maps[0])]
        for fuse, stage, finer in zip(self.resized_fuses, list(self.stages)[1:], maps[1:]):
            out.append(stage(fuse(out[-1], finer)))
        return out[::-1]
