"""SegFormer's head: every map projected to one width, enlarged to the first one's size, fused by a 1x1 convolution.

SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers (Xie et al. 2021, arXiv:2105.15203).
Two published forms: the authors' (https://github.com/NVlabs/SegFormer, NVIDIA's non-commercial licence; projections are
linear layers with a bias, maps joined from coarse to fine) and MMSegmentation's (Apache-2.0; projections are 1x1
convolutions with norm and ReLU, maps joined from fine to coarse). `convert` reads both. Targets and results: see
`segmentation`.
Differs: the cross-entropy is averaged over known pixels (average='all' is MMSegmentation's mean over all of them).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .conv import ConvNormReLU, classifier
from .pyramid import FeatureInfo, choose, positive
from .segmentation import SegmentationHead, resize
from .segmentation import convert as head_entries


class Projection(nn.Linear):
    """A linear layer on the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SegFormerHead(SegmentationHead):
    """Segmentation head on a backbone's maps.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; class ids are 0..K-1.
        channels: width; the authors take 256 for B0 and B1, 768 for the others.
        projection: 'linear' (the authors') or 'conv' (MMSegmentation's).
        ignore_index, class_weight, dice_weight, lovasz_weight, average: of the loss, see `SegmentationHead`.
        dropout: channel dropout before the classifier.
        norm: 'batch' (published), 'group' or 'none'.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 256,
        projection: str = 'linear',
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
        self.coarse_first = choose('projection', projection, ('linear', 'conv')) == 'linear'
        widths = self.inputs.channels()
        self.convs = nn.ModuleList(
            Projection(width, channels) if self.coarse_first else ConvNormReLU(width, channels, 1, norm=norm)
            for width in widths
        )
        self.fusion_conv = ConvNormReLU(channels * len(widths), channels, 1, norm=norm)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K, h, w) at the first map's size."""
        self.inputs.check(features)
        size = features[0].shape[-2:]
        maps = [resize(layer(x), size) for layer, x in zip(self.convs, features)]
        return self.conv_seg(self.dropout(self.fusion_conv(torch.cat(maps[::-1] if self.coarse_first else maps, 1))))


def convert(state: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a segmentor of the authors (projection='linear') or of MMSegmentation ('conv') under our names.

    The authors' files hold a classifier `conv_seg` that nothing uses beside the real one; it is left out.
    """
    entries = head_entries(state)
    if 'linear_pred.weight' not in entries:
        return entries
    renamed = {}
    for key, value in entries.items():
        if key.startswith('conv_seg.'):
            continue
        key = re.sub(r'^linear_c(\d+)\.proj\.', lambda match: f'convs.{int(match[1]) - 1}.', key)
        renamed[key.replace('linear_fuse.', 'fusion_conv.').replace('linear_pred.', 'conv_seg.')] = value
    return renamed
