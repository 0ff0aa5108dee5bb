"""UPerNet: Unified Perceptual Parsing for Scene Understanding (Xiao et al. 2018, arXiv:1807.10221).

Pyramid pooling (PSPNet, arXiv:1612.01105) on the last map, a top-down path with bilinear enlargement, one 3x3
convolution per finer map, and a 3x3 convolution over all of them at the first map's size. It reads the backbone's maps
without a neck. Keys are those of MMSegmentation's UPerHead (github.com/open-mmlab/mmsegmentation, Apache-2.0) after
`segmentation.convert`. Targets and results: see `segmentation`. With `mixer` the last convolution is a token mixer, as
in HorNet's decoder (arXiv:2207.14284).
Differs: the cross-entropy is averaged over known pixels (average='all' is MMSegmentation's mean over all of them);
before a mixer the maps are reduced to `channels` by a 1x1 convolution, where HorNet's decoder mixes while it reduces.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import average_pool
from .conv import ConvNormReLU, MixedMap, MixerSpec, classifier
from .pyramid import FeatureInfo, positive
from .segmentation import SegmentationHead, resize


class AveragePool(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d(bins) that exports with any size."""

    output_size: int

    def forward(self, x: Tensor) -> Tensor:
        return average_pool(x, self.output_size)


class PyramidPooling(nn.ModuleList):
    """The map, and for each scale its average over scale x scale bins, reduced to `channels` and enlarged again."""

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int], norm: str):
        super().__init__(
            nn.Sequential(AveragePool(scale), ConvNormReLU(in_channels, channels, 1, norm=norm)) for scale in scales
        )
        self.one_value = norm == 'batch' and 1 in scales

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.one_value and len(x) == 1:
            raise ValueError(
                "pool scale 1 leaves one value per channel of a single picture, which norm='batch' cannot train on; "
                "take batches of two or more, or norm='group'"
            )
        # Not `resize`: it asks whether the sizes are equal already, and an exported graph would be bound by the answer.
        size = x.shape[-2:]
        pooled = (F.interpolate(layer(x), size=size, mode='bilinear', align_corners=False) for layer in self)
        return torch.cat([x, *pooled], 1)


class UPerNet(SegmentationHead):
    """Segmentation head on a backbone's maps.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; class ids are 0..K-1.
        channels: width of every layer.
        pool_scales: bins per side of the pyramid pooling.
        ignore_index, class_weight, dice_weight, lovasz_weight, average: of the loss, see `SegmentationHead`.
        dropout: channel dropout before the classifier.
        norm: 'batch' (published), 'group' or 'none'.
        mixer: dict(type=GnConv, order=2), dict(type=HiLo), or any factory of a module (B, H, W, C) -> (B, H, W, C)
            that takes `dim`; None is the published 3x3 convolution.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        ignore_index: int = 255,
        class_weight: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        lovasz_weight: float = 0.0,
        dropout: float = 0.1,
        norm: str = 'batch',
        average: str = 'valid',
        mixer: MixerSpec | None = None,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            ignore_index=ignore_index,
            class_weight=class_weight,
            dice_weight=dice_weight,
            lovasz_weight=lovasz_weight,
            average=average,
        )
        positive('channels', channels)
        if not pool_scales or min(pool_scales) < 1:
            raise ValueError(f'pool_scales must be one or more positive numbers of bins, got {tuple(pool_scales)}')
        *finer, last = self.inputs.channels()
        self.psp_modules = PyramidPooling(last, channels, pool_scales, norm)
        self.bottleneck = ConvNormReLU(last + len(pool_scales) * channels, channels, norm=norm)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(width, channels, 1, norm=norm) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, norm=norm) for _ in finer)
        every = channels * len(self.inputs)
        self.fpn_bottleneck: nn.Module
        if mixer is None:
            self.fpn_bottleneck = ConvNormReLU(every, channels, norm=norm)
        else:
            self.fpn_bottleneck = nn.Sequential(
                ConvNormReLU(every, channels, 1, norm=norm), MixedMap(mixer, channels, norm=norm, relu=True)
            )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K, h, w) at the first map's size."""
        self.inputs.check(features)
        maps = [layer(x) for layer, x in zip(self.lateral_convs, features)]
        maps.append(self.bottleneck(self.psp_modules(features[-1])))
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[-2:])
        outs = [layer(x) for layer, x in zip(self.fpn_convs, maps)] + maps[-1:]
        size = outs[0].shape[-2:]
        fused = self.fpn_bottleneck(torch.cat([resize(x, size) for x in outs], 1))
        return self.conv_seg(self.dropout(fused))
