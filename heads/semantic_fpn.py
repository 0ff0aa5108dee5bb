"""Semantic FPN: the segmentation head of Panoptic Feature Pyramid Networks (Kirillov et al. 2019, arXiv:1901.02446).

Every level goes through (3x3 convolution, norm, ReLU, 2x bilinear upsampling) until it has the finest level's size, the
levels are summed, a 1x1 convolution gives logits at the finest stride. Keys are MMSegmentation's FPNHead's.
Targets: dicts with `mask` (H, W) int64, `ignore_index` where nothing is known; pictures may be smaller than the padded
batch. Results: {'mask': (H, W) int64}.
Differs: the cross-entropy is averaged over known pixels (average='all' is MMSegmentation's mean over all of them).
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ConvNormReLU, classifier
from .pyramid import FeatureInfo, positive
from .segmentation import SegmentationHead, resize


class SemanticFPN(SegmentationHead):
    """Segmentation head on an FPN's maps (or on a backbone's own: widths may differ).

    Args:
        feature_info: channels and strides of the maps; each stride the first times a power of two.
        num_classes: K; class ids are 0..K-1.
        channels: width of the branches.
        ignore_index, class_weight, dice_weight, lovasz_weight, average, loss_weight: see `SegmentationHead`.
        dropout: channel dropout before the classifier.
        norm: 'batch' (published), 'group' or 'none'.
        sub_pixel: the classifier predicts r x r logits per position, so they are r times finer than the first map
            (sub-pixel convolution, arXiv 1609.05158): for outlines thinner than its stride.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 128,
        ignore_index: int = 255,
        class_weight: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        lovasz_weight: float = 0.0,
        dropout: float = 0.1,
        norm: str = 'batch',
        sub_pixel: int = 1,
        average: str = 'valid',
        loss_weight: float = 1.0,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            ignore_index=ignore_index,
            class_weight=class_weight,
            dice_weight=dice_weight,
            lovasz_weight=lovasz_weight,
            average=average,
            loss_weight=loss_weight,
        )
        strides = self.inputs.reduction()
        self.scale_heads = nn.ModuleList()
        for width, stride in zip(self.inputs.channels(), strides):
            doublings = math.log2(stride / strides[0])
            if doublings != int(doublings):
                raise ValueError(f'SemanticFPN needs strides that are the first times a power of two, got {strides}')
            layers: list[nn.Module] = []
            for i in range(max(1, int(doublings))):
                layers.append(ConvNormReLU(width if i == 0 else channels, channels, norm=norm))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.sub_pixel = positive('sub_pixel', sub_pixel)
        self.conv_seg = classifier(channels, num_classes * sub_pixel**2)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K, h, w) at the first map's size, times `sub_pixel`."""
        self.inputs.check(features)
        total = self.scale_heads[0](features[0])
        size = total.shape[-2:]
        for head, x in zip(list(self.scale_heads)[1:], features[1:]):
            # Odd sizes: ceil at each stride makes the doubled map larger than the finest (7 -> 14 -> 28 -> 56 for 50).
            total = total + resize(head(x), size)
        return F.pixel_shuffle(self.conv_seg(self.dropout(total)), self.sub_pixel)
