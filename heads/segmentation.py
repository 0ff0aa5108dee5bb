"""What segmentation heads share: the loss of logits against masks, and masks from logits.

Targets: dicts with `mask` (H, W) int64, `ignore_index` where nothing is known; pictures may be smaller than the padded
batch. Results: {'mask': (H, W) int64}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import lovasz_softmax, soft_dice
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, choose, positive


class SegmentationHead(nn.Module):
    """Base of heads whose `forward` gives logits (B, K, h, w), of any size: they are resized to that of the pictures.

    Args:
        feature_info: channels and strides of the maps.
        num_classes: K; class ids are 0..K-1.
        ignore_index: value of `mask` that is not scored (255, or any outside 0..K-1).
        class_weight: K factors of the cross-entropy, for instance a light background. `loss` reads the buffer
            `class_weight`, which may be changed during training.
        dice_weight, lovasz_weight: factors of two region losses that thin or rare classes need; 0 leaves them out.
        average: 'valid' divides the cross-entropy by the (weighted) known pixels, 'all' by all pixels.
        loss_weight: factor of all terms, for an auxiliary head.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        ignore_index: int = 255,
        class_weight: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        lovasz_weight: float = 0.0,
        average: str = 'valid',
        loss_weight: float = 1.0,
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        self.ignore_index = ignore_index
        self.dice_weight = dice_weight
        self.lovasz_weight = lovasz_weight
        self.loss_weight = loss_weight
        self.average = choose('average', average, ('valid', 'all'))
        if 0 <= ignore_index < num_classes:
            raise ValueError(f'ignore_index must not be a class id (0..{num_classes - 1}), got {ignore_index}')
        if class_weight is not None and len(class_weight) != num_classes:
            raise ValueError(f'class_weight needs num_classes={num_classes} entries, got {len(class_weight)}')
        weight = None if class_weight is None else torch.tensor([float(w) for w in class_weight])
        self.register_buffer('class_weight', weight, persistent=False)

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_seg', 'loss_dice', 'loss_lovasz': as asked for, 'pixel_accuracy': of known pixels, logged only}."""
        padded = self.inputs.padded_size(features)
        logits = resize(self(features), padded).float()
        labels = gather_masks(
            [t['mask'] for t in targets],
            padded,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            device=logits.device,
        )
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
        losses = {name: self.loss_weight * value for name, value in losses.items()}
        with torch.no_grad():
            losses['pixel_accuracy'] = ((logits.argmax(1) == labels) & known).sum() / known.sum().clamp(min=1)
        return losses

    def predict(
        self, features: Sequence[Tensor], sizes: Sequence[Size], original_sizes: Sequence[Size] | None = None
    ) -> list[dict[str, Tensor]]:
        """One {'mask': (h, w) int64} per picture, of `original_sizes` where given, else of `sizes`."""
        padded = self.inputs.padded_size(features)
        check_sizes(sizes, len(features[0]), padded, original_sizes)
        logits = resize(self(features).float(), padded)
        results = []
        for i, (height, width) in enumerate(sizes):
            valid = logits[i : i + 1, :, :height, :width]
            if original_sizes is not None:
                valid = resize(valid, tuple(original_sizes[i]))
            results.append({'mask': valid[0].argmax(0)})
        return results


def gather_masks(
    masks: Sequence[Tensor], padded: Size, *, num_classes: int, ignore_index: int, device: torch.device
) -> Tensor:
    """Masks of a batch in one (B, H, W) int64 tensor, padded with ignore_index; ValueError for impossible ones."""
    batch = torch.full((len(masks), *padded), ignore_index, dtype=torch.int64, device=device)
    for i, mask in enumerate(masks):
        height, width = mask.shape
        if height > padded[0] or width > padded[1]:
            raise ValueError(f'mask must not be larger than the padded batch {padded}, got {(height, width)}')
        batch[i, :height, :width] = mask
    wrong = (batch != ignore_index) & ((batch < 0) | (batch >= num_classes))
    if wrong.any():
        raise ValueError(
            f'mask values must be 0..{num_classes - 1} or ignore_index={ignore_index}, got {int(batch[wrong][0])}'
        )
    return batch


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, to (height, width)."""
    return x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size=size, mode='bilinear', align_corners=False)


def convert(state: Mapping[str, Any], part: str = 'decode_head') -> dict[str, Any]:
    """The entries of one head of a MMSegmentation checkpoint, under our names, which are theirs without the head's.

    Args:
        state: the whole state dict.
        part: 'decode_head', or 'auxiliary_head' (with '.0', '.1' where there are several).
    """
    entries = {key.removeprefix(f'{part}.'): value for key, value in state.items() if key.startswith(f'{part}.')}
    return {
        key.replace('.gn.', '.bn.'): value for key, value in entries.items()
    }  # ours are called alike, whatever kind
