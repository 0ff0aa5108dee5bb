"""FCN: convolutions and a classifier on one map, as the auxiliary head that UPerNet and others are trained with.

Fully Convolutional Networks (Long et al. 2015, arXiv:1411.4038) in the form of MMSegmentation's FCNHead
(github.com/open-mmlab/mmsegmentation, Apache-2.0), whose keys are ours. Targets and results: see `segmentation`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conv import ConvNormReLU, classifier
from .pyramid import FeatureInfo
from .segmentation import SegmentationHead


class FCN(SegmentationHead):
    """Logits at the stride of one map.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; class ids are 0..K-1.
        level: which map it reads, counted as Python does; the published auxiliary heads read stride 16, level -2.
        channels: width of the convolutions.
        num_convs: how many; 0 classifies the map as it is.
        kernel: of the convolutions.
        concat_input: one more convolution over the map and what the others made of it.
        ignore_index, class_weight, dice_weight, lovasz_weight, average, loss_weight: see `SegmentationHead`.
        dropout: channel dropout before the classifier.
        norm: 'batch' (published), 'group' or 'none'.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        level: int = -2,
        channels: int = 256,
        num_convs: int = 1,
        kernel: int = 3,
        concat_input: bool = False,
        ignore_index: int = 255,
        class_weight: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        lovasz_weight: float = 0.0,
        dropout: float = 0.1,
        norm: str = 'batch',
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
        count = len(self.inputs)
        if not -count <= level < count:
            raise ValueError(f'level must be an index of the {count} maps, got {level}')
        self.level = level
        width = self.inputs.channels()[level]
        if num_convs == 0 and channels != width:
            raise ValueError(f'num_convs=0 needs channels equal to those of the map, got {channels} and {width}')
        self.convs = nn.Sequential(
            *(ConvNormReLU(channels if i else width, channels, kernel, norm=norm) for i in range(num_convs))
        )
        self.conv_cat = ConvNormReLU(width + channels, channels, kernel, norm=norm) if concat_input else None
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K, h, w) at the size of the map that is read."""
        self.inputs.check(features)
        x = features[self.level]
        out = self.convs(x)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], 1))
        return self.conv_seg(self.dropout(out))
