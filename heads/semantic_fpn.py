"""Semantic FPN: the segmentation head of Panoptic Feature Pyramid Networks (Kirillov et al. 2019, arXiv:1901.02446).

Every level goes through (3x3 convolution, norm, ReLU, 2x bilinear upsampling) until it has the finest level's size, the
levels are summed, a 1x1 convolution gives logits at the finest stride. Keys are MMSegmentation's FPNHead's.
Targets: dicts with `mask` (H, W) int64, `ignore_index` where nothing is known; pictures may be smaller than the padded
batch. Results: {'mask': (H, W) int64}.
Differs: the cross-entropy is averaged over known pixels (average='all' is MMSegmentation's mean over all of them).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import lovasz_softmax, soft_dice
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, choose, norm_layer, positive


class ConvNormReLU(nn.Module):
    """3x3 convolution without bias, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__()
        layer = norm_layer(norm)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=layer is None)
        self.bn = layer(out_channels) if layer else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SemanticFPN(nn.Module):
    """Segmentation head on an FPN's maps (or on a backbone's own: widths may differ).

    Args:
        feature_info: channels and strides of the maps; each stride the first times a power of two.
        num_classes: K; class ids are 0..K-1.
        channels: width of the branches.
        ignore_index: value of `mask` that is not scored (255, or any outside 0..K-1).
        class_weight: K factors of the cross-entropy, for instance a light background. `loss` reads the buffer
            `class_weight`, which may be changed during training.
        dice_weight, lovasz_weight: factors of two region losses that thin or rare classes need; 0 leaves them out.
        dropout: channel dropout before the classifier.
        norm: 'batch' (published), 'group' or 'none'.
        average: 'valid' divides the cross-entropy by the (weighted) known pixels, 'all' by all pixels.
    """

    class_weight: Tensor | None

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
        average: str = 'valid',
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        self.ignore_index = ignore_index
        self.dice_weight = dice_weight
        self.lovasz_weight = lovasz_weight
        self.average = choose('average', average, ('valid', 'all'))
        if 0 <= ignore_index < num_classes:
            raise ValueError(f'ignore_index must not be a class id (0..{num_classes - 1}), got {ignore_index}')
        if class_weight is not None and len(class_weight) != num_classes:
            raise ValueError(f'class_weight needs num_classes={num_classes} entries, got {len(class_weight)}')
        weight = None if class_weight is None else torch.tensor([float(w) for w in class_weight])
        self.register_buffer('class_weight', weight, persistent=False)

        strides = self.inputs.reduction()
        self.scale_heads = nn.ModuleList()
        for width, stride in zip(self.inputs.channels(), strides):
            doublings = math.log2(stride / strides[0])
            if doublings != int(doublings):
                raise ValueError(f'SemanticFPN needs strides that are the first times a power of two, got {strides}')
            layers: list[nn.Module] = []
            for i in range(max(1, int(doublings))):
                layers.append(ConvNormReLU(width if i == 0 else channels, channels, norm))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.get_parameter('bias'))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K, h, w) at the first map's size."""
        self.inputs.check(features)
        total = self.scale_heads[0](features[0])
        size = total.shape[-2:]
        for head, x in zip(list(self.scale_heads)[1:], features[1:]):
            # Odd sizes: ceil at each stride makes the doubled map larger than the finest (7 -> 14 -> 28 -> 56 for 50).
            total = total + _resize(head(x), size)
        return self.conv_seg(self.dropout(total))

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_seg', 'loss_dice', 'loss_lovasz': as asked for, 'pixel_accuracy': of known pixels, logged only}."""
        padded = self.inputs.padded_size(features)
        logits = _resize(self(features), padded).float()
        labels = self._gather_masks([t['mask'] for t in targets], padded, logits.device)
        known = labels != self.ignore_index
        weight = None if self.class_weight is None else self.class_weight.to(logits)
        total = F.cross_entropy(logits, labels, weight, ignore_index=self.ignore_index, reduction='sum')
        if self.average == 'all':
            count = torch.tensor(float(labels.numel()), device=logits.device)
        elif weight is None:
            count = known.sum().float()
        else:
            count = (weight[labels.clamp(0, self.num_classes - 1)] * known).sum()
        losses = {'loss_seg': total / count.clamp(min=1e-6)}
        if self.dice_weight:
            losses['loss_dice'] = self.dice_weight * soft_dice(logits, labels, known)
        if self.lovasz_weight:
            losses['loss_lovasz'] = self.lovasz_weight * lovasz_softmax(logits, labels, known)
        with torch.no_grad():
            losses['pixel_accuracy'] = ((logits.argmax(1) == labels) & known).sum() / known.sum().clamp(min=1)
        return losses

    def predict(
        self, features: Sequence[Tensor], sizes: Sequence[Size], original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """One {'mask': (h, w) int64} per picture, of `original_sizes` where given, else of `sizes`."""
        padded = self.inputs.padded_size(features)
        check_sizes(sizes, len(features[0]), padded, original_sizes)
        logits = _resize(self(features).float(), padded)
        results = []
        for i, (height, width) in enumerate(sizes):
            valid = logits[i : i + 1, :, :height, :width]
            if original_sizes is not None:
                valid = _resize(valid, tuple(original_sizes[i]))
            results.append({'mask': valid[0].argmax(0)})
        return results

    def _gather_masks(self, masks: Sequence[Tensor], padded: Size, device: torch.device) -> Tensor:
        """Masks of a batch in one (B, H, W) int64 tensor, padded with ignore_index; ValueError for impossible ones."""
        batch = torch.full((len(masks), *padded), self.ignore_index, dtype=torch.int64, device=device)
        for i, mask in enumerate(masks):
            height, width = mask.shape
            if height > padded[0] or width > padded[1]:
                raise ValueError(f'mask must not be larger than the padded batch {padded}, got {(height, width)}')
            batch[i, :height, :width] = mask
        wrong = (batch != self.ignore_index) & ((batch < 0) | (batch >= self.num_classes))
        if wrong.any():
            raise ValueError(
                f'mask values must be 0..{self.num_classes - 1} or ignore_index={self.ignore_index}, '
                f'got {int(batch[wrong][0])}'
            )
        return batch


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size=size, mode='bilinear', align_corners=False)
