"""SBCB: boundaries of the classes as a second task of the backbone's maps, in training alone.

Boosting Semantic Segmentation with Semantic Boundaries (Ishikawa and Aoki 2023, arXiv:2304.09427); facts from the
authors' code, https://github.com/haruishi43/boundary_boost_mmseg. A CASENet head (arXiv:1705.09759): every map but the
last gives one boundary logit per position, the last gives one per class, and a grouped 1x1 convolution fuses, for each
class, its logit with the shared ones. Its gradients teach the early stages where classes end; at inference it is not
there. It takes the place of no head: give it to any segmentor as `auxiliary=dict(boundary=dict(type=SBCB, ...))`.

Targets: dicts with `mask` (H, W) int64 as `segmentation` has them; boundaries are drawn from the masks as they come,
after every augmentation, on the device.
Differs: boundaries between a class and the unknown count for neither side, and unknown pixels have no loss; instances
of one class that touch have no boundary between them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ConvNormReLU
from .pyramid import FeatureInfo, PyramidInfo, Size, positive
from .segmentation import gather_masks, resize


# B pictures, K classes, L maps, H W the padded batch, h w the boundary logits
class SideLayer(nn.Module):
    """1x1 convolution, norm, ReLU to `channels`, enlarged bilinearly to a given size, 3x3 convolution."""

    def __init__(self, in_channels: int, channels: int, *, norm: str, bias: bool):
        super().__init__()
        self.reduce = ConvNormReLU(in_channels, channels, 1, norm=norm)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias, padding_mode='reflect')

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.conv(resize(self.reduce(x), size))


class SBCB(nn.Module):
    """Auxiliary head of semantic boundaries.

    Args:
        feature_info: channels and strides of the backbone's maps, two or more.
        num_classes: K; class ids are 0..K-1.
        levels: indices of the maps to read, rising; all if None. The last one carries the classes.
        radius: a pixel at most so far from one of another class is a boundary of both, in pixels of the picture.
        stride: of the boundary logits; 1 as published, more for many classes on large pictures (K logits per position).
        loss_weight: factor of both terms.
        ignore_index: value of `mask` where nothing is known.
        norm: 'batch' (published), 'group' or 'none'.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        levels: Sequence[int] | None = None,
        radius: int = 2,
        stride: int = 1,
        loss_weight: float = 5.0,
        ignore_index: int = 255,
        norm: str = 'batch',
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        self.num_classes = positive('num_classes', num_classes)
        count = len(self.inputs)
        self.levels = tuple(range(count)) if levels is None else tuple(levels)
        if len(self.levels) < 2 or list(self.levels) != sorted(set(self.levels) & set(range(count))):
            raise ValueError(f'levels must be two or more rising indices of the {count} maps, got {self.levels}')
        self.radius, self.stride = positive('radius', radius), positive('stride', stride)
        if 0 <= ignore_index < num_classes:
            raise ValueError(f'ignore_index must not be a class id (0..{num_classes - 1}), got {ignore_index}')
        self.ignore_index, self.loss_weight = ignore_index, loss_weight
        widths = [self.inputs.channels()[level] for level in self.levels]
        # A shared logit has no bias: a boundary is not more likely everywhere.
        self.sides = nn.ModuleList(SideLayer(width, 1, norm=norm, bias=False) for width in widths[:-1])
        self.semantic = SideLayer(widths[-1], num_classes, norm=norm, bias=True)
        self.fuse = nn.Conv2d(num_classes * len(widths), num_classes, 1, groups=num_classes)
        nn.init.constant_(self.fuse.weight, 1 / len(widths))
        nn.init.zeros_(self.fuse.get_parameter('bias'))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> boundary logits (B, K, h, w): of all maps fused, and of the last map alone."""
        self.inputs.check(features)
        height, width = self.inputs.padded_size(features)
        size = (-(-height // self.stride), -(-width // self.stride))
        maps = [features[level] for level in self.levels]
        semantic = self.semantic(maps[-1], size)
        shared = torch.cat([side(x, size) for side, x in zip(self.sides, maps)], 1)
        # The grouped convolution over (own, shared ...) of each class, without the map of K L channels that it reads.
        weight = self.fuse.weight
        fused = F.conv2d(shared, weight[:, 1:], self.fuse.bias) + weight[:, :1, 0, 0].t()[..., None, None] * semantic
        return fused, semantic

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_fused', 'loss_last'}: cross-entropies of the two kinds of logits with the masks' boundaries."""
        labels = gather_masks(
            [target['mask'] for target in targets],
            self.inputs.padded_size(features),
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            device=features[0].device,
        )
        edges, known = boundaries(labels, self.num_classes, radius=self.radius, ignore_index=self.ignore_index)
        if self.stride > 1:  # a position holds a boundary if one of its pixels does
            edges, known = (F.max_pool2d(x.float(), self.stride, ceil_mode=True) > 0 for x in (edges, known[:, None]))
            known = known[:, 0]
        fused, semantic = self(features)
        return {
            'loss_fused': self.loss_weight * boundary_loss(fused.float(), edges, known),
            'loss_last': self.loss_weight * boundary_loss(semantic.float(), edges, known),
        }


def boundaries(labels: Tensor, num_classes: int, *, radius: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which pixels are near the border of which class.

    Args:
        labels: (B, H, W) int64, 0..K-1 or ignore_index.
        radius: r, in pixels.

    Returns:
        edges (B, K, H, W) bool: a pixel of class c within r (Euclidean) of a known pixel of another class, or a known
        pixel of another class within r of one of class c; and known (B, H, W) bool. Outside the picture is unknown.
    """
    height, width = labels.shape[-2:]
    known = labels != ignore_index
    # Plane K takes what belongs nowhere, so that every pixel can be scattered without a condition.
    own = torch.where(known, labels, num_classes)
    padded = F.pad(own, (radius,) * 4, value=num_classes)
    planes = torch.zeros(len(labels), num_classes + 1, height, width, dtype=torch.bool, device=labels.device)
    near = torch.zeros_like(known)
    reach = range(-radius, radius + 1)
    for dy, dx in ((dy, dx) for dy in reach for dx in reach if 0 < dy * dy + dx * dx <= radius * radius):
        other = padded[:, radius + dy : radius + dy + height, radius + dx : radius + dx + width]
        differs = known & (other != own) & (other != num_classes)
        planes.scatter_(1, torch.where(differs, other, num_classes)[:, None], True)
        near |= differs
    planes.scatter_(1, torch.where(near, own, num_classes)[:, None], True)
    return planes[:, :num_classes], known


def boundary_loss(logits: Tensor, edges: Tensor, known: Tensor) -> Tensor:
    """Mean over pictures of the mean cross-entropy over classes and known pixels; boundaries weigh as much as the rest.

    A boundary's term is multiplied by w = (N - P) / P of its picture, at least 1: N known pixels, P boundaries summed
    over the classes. Without any boundary, or any known pixel, the picture's term is that of the rest, or 0.

    Args:
        logits: (B, K, h, w) float.
        edges: (B, K, h, w) bool.
        known: (B, h, w) bool.
    """
    known = known[:, None]
    edges = edges & known
    pixels = known.sum((1, 2, 3)).to(logits)
    positives = edges.sum((1, 2, 3)).to(logits)
    weight = ((pixels - positives) / positives.clamp(min=1)).clamp(min=1)
    each = F.binary_cross_entropy_with_logits(
        logits, edges.to(logits), pos_weight=weight[:, None, None, None], reduction='none'
    )
    return ((each * known).sum((1, 2, 3)) / (logits.shape[1] * pixels).clamp(min=1)).mean()
