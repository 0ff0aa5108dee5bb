"""DeepLabV3+: Encoder-Decoder with Atrous Separable Convolution for Semantic Segmentation (Chen et al. 2018,
arXiv:1802.02611).

Atrous spatial pyramid pooling on the last map (its mean, a 1x1 convolution, separable convolutions of rising dilation),
enlarged to the first map's size, joined with that map and refined by two separable convolutions. The maps between are
not read: leave them out with out_indices=(0, 3). Keys are those of MMSegmentation's DepthwiseSeparableASPPHead
(github.com/open-mmlab/mmsegmentation, Apache-2.0) after `segmentation.convert`. Targets, results: see `segmentation`.
Differs: the cross-entropy is averaged over known pixels (average='all' is MMSegmentation's mean over all of them). The
published dilations are for a last map of stride 8 or 16; ours has whatever stride the backbone gives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conv import ConvNormReLU, SeparableConv, classifier
from .pyramid import FeatureInfo, positive
from .segmentation import SegmentationHead, resize
from .upernet import AveragePool


class DeepLabV3Plus(SegmentationHead):
    """Segmentation head on the first and the last map.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; class ids are 0..K-1.
        channels: width of the branches and of what follows.
        low_channels: width that the first map is reduced to.
        dilations: one branch each; dilation 1 is a 1x1 convolution.
        ignore_index, class_weight, dice_weight, lovasz_weight, average: of the loss, see `SegmentationHead`.
        dropout: channel dropout before the classifier.
        norm: 'batch' (published), 'group' or 'none'.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 512,
        low_channels: int = 48,
        dilations: Sequence[int] = (1, 6, 12, 18),
        ignore_index: int = 255,
        class_weight: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        lovasz_weight: float = 0.0,
        dropout: float = 0.1,
        norm: str = 'batch',
        average: str = 'valid',
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
        positive('low_channels', low_channels)
        if not dilations or min(dilations) < 1:
            raise ValueError(f'dilations must be one or more positive numbers, got {tuple(dilations)}')
        first, last = self.inputs.channels()[0], self.inputs.channels()[-1]
        self.one_value = norm == 'batch'
        self.image_pool = nn.Sequential(AveragePool(1), ConvNormReLU(last, channels, 1, norm=norm))
        self.aspp_modules = nn.ModuleList(
            ConvNormReLU(last, channels, 1, norm=norm)
            if dilation == 1
            else SeparableConv(last, channels, norm=norm, dilation=dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvNormReLU((len(dilations) + 1) * channels, channels, norm=norm)
        self.c1_bottleneck = ConvNormReLU(first, low_channels, 1, norm=norm)
        self.sep_bottleneck = nn.Sequential(
            SeparableConv(channels + low_channels, channels, norm=norm), SeparableConv(channels, channels, norm=norm)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K, h, w) at the first map's size."""
        self.inputs.check(features)
        fine, x = features[0], features[-1]
        if self.training and self.one_value and len(x) == 1:
            raise ValueError(
                "the mean over one picture is one value per channel, which norm='batch' cannot train on; take batches "
                "of two or more, or norm='group'"
            )
        branches = [resize(self.image_pool(x), x.shape[-2:]), *(layer(x) for layer in self.aspp_modules)]
        coarse = resize(self.bottleneck(torch.cat(branches, 1)), fine.shape[-2:])
        out = self.sep_bottleneck(torch.cat([coarse, self.c1_bottleneck(fine)], 1))
        return self.conv_seg(self.dropout(out))
