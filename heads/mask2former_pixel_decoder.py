"""The pixel decoder of Mask2Former (Cheng et al. 2022, arXiv:2112.01527): deformable attention over the coarse maps,
then a feature pyramid down to the finest one. Needs no compiled operator (see `deformable_attention`).

Written from the paper and from facts of facebookresearch/Mask2Former (MIT). Padding is not masked, as published.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import full_precision
from .pyramid import FeatureInfo, PyramidInfo, Size, norm_layer, positive
from .transformer import DeformableEncoderLayer, sine_positions

# B batch, C width, H W size of a map, N cells of all encoded maps, L encoded maps


class PixelMaps(NamedTuple):
    """`mask` (B, mask_channels, H, W), of the finest stride or finer; `levels`: three maps (B, C, H_i, W_i), coarsest
    first."""

    mask: Tensor
    levels: list[Tensor]


class ConvGroupNorm(nn.Module):
    """Convolution without bias, group norm, ReLU if asked for."""

    def __init__(self, in_channels: int, channels: int, kernel: int, act: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = group_norm(channels)
        self.act = act
        nn.init.kaiming_uniform_(self.conv.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.act else x


def group_norm(channels: int) -> nn.Module:
    """Of 32 groups, fewer where a group would have a single channel."""
    layer = norm_layer('group')
    assert layer is not None
    return layer(channels)


class DeformablePixelDecoder(nn.Module):
    """A backbone's maps -> the maps that queries look at and the one that masks are read from.

    Args:
        feature_info: channels and strides of the maps, finest first.
        channels: C, of the encoder.
        mask_channels: of the map for masks.
        sub_pixel: that map has r x r values per cell of the finest one (sub-pixel convolution, arXiv 1609.05158): for
            outlines thinner than its stride; 1 as published.
        num_levels: the coarsest maps, which are encoded.
        num_layers: of the encoder.
        hidden, num_heads, num_points, dropout: of a layer.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        channels: int = 256,
        mask_channels: int = 256,
        num_levels: int = 3,
        num_layers: int = 6,
        hidden: int = 1024,
        num_heads: int = 8,
        num_points: int = 4,
        dropout: float = 0.0,
        sub_pixel: int = 1,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        if channels % 4:
            raise ValueError(f'channels must be a multiple of 4 (sines and cosines of two axes), got {channels}')
        if len(self.inputs) < 3 or not 1 <= num_levels <= len(self.inputs):
            raise ValueError(
                f'the pixel decoder needs three maps or more and num_levels of them, got {len(self.inputs)} maps, '
                f'{num_levels=}'
            )
        self.channels = channels
        widths = self.inputs.channels()
        self.num_levels = num_levels
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, 1), group_norm(channels)) for width in widths[::-1][:num_levels]
        )
        self.level_embed = nn.Parameter(torch.randn(num_levels, channels))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(
                channels=channels,
                num_levels=num_levels,
                num_points=num_points,
                num_heads=num_heads,
                hidden=hidden,
                dropout=dropout,
            )
            for _ in range(positive('num_layers', num_layers))
        )
        fine = widths[: len(widths) - num_levels]
        self.adapters = nn.ModuleList(ConvGroupNorm(width, channels, 1, act=False) for width in fine)
        self.outputs = nn.ModuleList(ConvGroupNorm(channels, channels, 3, act=True) for _ in fine)
        self.sub_pixel = positive('sub_pixel', sub_pixel)
        self.mask_features = nn.Conv2d(channels, mask_channels * sub_pixel**2, 1)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim > 1 and 'sampling_offsets' not in name and 'attention_weights' not in name:
                nn.init.xavier_uniform_(parameter)
        convolutions = [
            module for part in self.input_proj for module in part.modules() if isinstance(module, nn.Conv2d)
        ]
        for conv in (*convolutions, self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.get_parameter('bias'))

    def forward(self, features: Sequence[Tensor]) -> PixelMaps:
        self.inputs.check(features)
        # Places that attention samples need more than the eight bits of a half-precision mantissa.
        with full_precision(features[0]):
            return self._forward([f.to(self.level_embed.dtype) for f in features])

    def _forward(self, features: Sequence[Tensor]) -> PixelMaps:
        maps = [project(x) for project, x in zip(self.input_proj, reversed(features))]
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        device = maps[0].device
        cells = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        position = torch.cat(
            [
                sine_positions(*shape, self.channels, None, device).to(cells.dtype) + level
                for shape, level in zip(shapes, self.level_embed)
            ],
            1,
        )
        reference = centres(shapes, device).to(cells.dtype)
        for layer in self.layers:
            cells = layer(cells, position, reference, shapes)
        sizes = [h * w for h, w in shapes]
        out = [
            part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(cells.split(sizes, 1), shapes)
        ]  # coarsest first
        fine = list(zip(self.adapters, self.outputs, features))
        for adapt, finish, x in reversed(fine):
            lateral = adapt(x)
            above = F.interpolate(out[-1], size=lateral.shape[-2:], mode='bilinear', align_corners=False)
            out.append(finish(lateral + above))
        return PixelMaps(F.pixel_shuffle(self.mask_features(out[-1]), self.sub_pixel), out[:3])


def centres(shapes: Sequence[Size], device: torch.device) -> Tensor:
    """Where each cell lies on its own map, as fractions x, y: (1, N, 1, 2)."""
    parts = []
    for height, width in shapes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        parts.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(parts)[None, :, None]
