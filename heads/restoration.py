"""UNetRestorer: a U-shaped decoder that turns any feature pyramid into a correction of the picture at full resolution.

U-Net (Ronneberger et al. 2015) with the global residual of DnCNN (Zhang et al. 2017): the head has a light
convolutional encoder of its own at strides 1 and 2 (no backbone keeps those), the backbone's maps join at theirs, and
the last convolution starts at zero, so an untrained head returns the picture unchanged. No norm: batch statistics
hurt restoration. Pictures are float (B, C, H, W) in [0, 1] of any size; all padding happens inside.
Targets: dicts with `clean` (C, h, w). Results: {'image': (C, h, w) float in [0, 1]}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import charbonnier
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, choose, positive


class ResidualBlock(nn.Module):
    """x + conv3x3(GELU(conv3x3(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(x)))


class Merge(nn.Module):
    """Coarse map up to the finer one's size (aligned at the top left), plus the finer map, then residual blocks."""

    def __init__(self, coarse: int, fine: int, channels: int, blocks: int):
        super().__init__()
        self.reduce = nn.Conv2d(coarse, channels, 1)
        self.lateral = nn.Conv2d(fine, channels, 1)
        self.blocks = nn.Sequential(*[ResidualBlock(channels) for _ in range(blocks)])

    def forward(self, coarse: Tensor, fine: Tensor, ratio: float) -> Tensor:
        coarse, fine = self.reduce(coarse), self.lateral(fine)
        height, width = fine.shape[-2:]
        if ratio == int(ratio):
            # Maps are ceil(H / stride) and padded right and bottom: scaling by the ratio keeps pixels aligned.
            up = F.interpolate(coarse, scale_factor=int(ratio), mode='bilinear', align_corners=False)
            up = up[..., :height, :width]
        else:
            up = F.interpolate(coarse, size=(height, width), mode='bilinear', align_corners=False)
        return self.blocks(up + fine)


class UNetRestorer(nn.Module):
    """Restoration head on any pyramid.

    Args:
        feature_info: channels and strides of the maps (strides 4 to 32, or any rising subset; 3 and more).
        in_chans: channels of the picture.
        channels: width at full resolution; half resolution has twice, everything coarser four times as many.
        blocks: residual blocks at full, half and each coarser resolution of the decoder.
        stem_blocks: residual blocks of the head's own encoder at full and half resolution.
        loss: 'charbonnier', 'l1' or 'mse', averaged over the pixels of all pictures.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        in_chans: int = 3,
        channels: int = 24,
        blocks: Sequence[int] = (1, 1, 1),
        stem_blocks: Sequence[int] = (0, 1),
        loss: str = 'charbonnier',
    ):
        super().__init__()
        self.inputs = PyramidInfo.of(feature_info)
        if self.inputs.reduction()[0] < 3:
            raise ValueError(
                'feature_info must start at stride 3 or more (UNetRestorer has its own maps at 1 and 2), '
                f'got {self.inputs.reduction()}'
            )
        if len(blocks) != 3 or len(stem_blocks) != 2:
            raise ValueError(f'blocks needs three and stem_blocks two entries, got {blocks} and {stem_blocks}')
        self.loss_name = choose('loss', loss, ('charbonnier', 'l1', 'mse'))
        full, half, deep = positive('channels', channels), 2 * channels, 4 * channels
        self.stem_full = nn.Sequential(
            nn.Conv2d(positive('in_chans', in_chans), full, 3, padding=1),
            *[ResidualBlock(full) for _ in range(stem_blocks[0])],
        )
        self.stem_half = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * full, half, 1), *[ResidualBlock(half) for _ in range(stem_blocks[1])]
        )
        widths = [full, half, *self.inputs.channels()]
        outs = [full, half] + [deep] * (len(self.inputs) - 1)
        self.strides = [1, 2, *self.inputs.reduction()]
        # merges[i] brings level i + 1 to level i; the deepest level enters as the backbone gives it.
        self.merges = nn.ModuleList(
            Merge(outs[i + 1] if i + 1 < len(outs) else widths[-1], widths[i], outs[i], blocks[min(i, 2)])
            for i in range(len(outs))
        )
        self.last = nn.Conv2d(full, in_chans, 3, padding=1)
        self.in_chans = in_chans
        self._init_weights()

    def _init_weights(self) -> None:
        """Maps keep about unit variance down to the last convolution, whatever the depth."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_in', nonlinearity='linear')
                nn.init.zeros_(module.get_parameter('bias'))
        for module in self.modules():
            if isinstance(module, Merge):  # two summands
                module.reduce.weight.data.mul_(0.5**0.5)
                module.lateral.weight.data.mul_(0.5**0.5)
            elif isinstance(module, ResidualBlock):  # close to the identity
                module.conv2.weight.data.mul_(0.1)
        nn.init.zeros_(self.last.weight)

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Maps and pictures (B, C, H, W) in [0, 1] -> what to add to the pictures (B, C, H, W)."""
        self.inputs.check(features)
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f'images must be (B, {self.in_chans}, H, W), got {tuple(images.shape)}')
        full = self.stem_full(images)
        height, width = images.shape[-2:]
        # Ceil-first, so that the same expression exports with dynamic sizes.
        bottom, right = (height + 1) // 2 * 2 - height, (width + 1) // 2 * 2 - width
        levels = [full, self.stem_half(F.pad(full, (0, right, 0, bottom))), *features]
        x = levels[-1]
        for i in reversed(range(len(self.merges))):
            x = self.merges[i](x, levels[i], self.strides[i + 1] / self.strides[i])
        return self.last(x)

    def loss(
        self, features: Sequence[Tensor], images: Tensor, targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """{'loss_<name>': scalar, 'psnr': of this batch in dB, logged only}; only pixels inside each `clean` count."""
        restored = images.float() + self(features, images).float()
        clean, inside = gather_clean([t['clean'] for t in targets], restored)
        difference = restored - clean
        if self.loss_name == 'charbonnier':
            each = charbonnier(difference)
        else:
            each = difference.abs() if self.loss_name == 'l1' else difference.square()
        mse = _mean(difference.detach().square(), inside)
        return {f'loss_{self.loss_name}': _mean(each, inside), 'psnr': -10 * torch.log10(mse.clamp(min=1e-10))}

    def predict(
        self,
        features: Sequence[Tensor],
        images: Tensor,
        sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
    ) -> list[dict[str, Tensor]]:
        """One {'image': (C, h, w) float in [0, 1]} per picture, of `original_sizes` where given, else of `sizes`."""
        check_sizes(sizes, len(images), (images.shape[-2], images.shape[-1]), original_sizes)
        restored = (images.float() + self(features, images).float()).clamp(0, 1)
        results = []
        for i, (height, width) in enumerate(sizes):
            picture = restored[i, :, :height, :width]
            if original_sizes is not None and tuple(original_sizes[i]) != (height, width):
                picture = F.interpolate(
                    picture[None], size=tuple(original_sizes[i]), mode='bicubic', align_corners=False, antialias=True
                )[0].clamp(0, 1)
            results.append({'image': picture})
        return results


def gather_clean(pictures: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Clean pictures in one tensor of the padded batch's shape; a (B, 1, H, W) 0/1 mask unless all of it is valid."""
    shape = tuple(like.shape)
    if len(pictures) != shape[0] or any(
        p.shape[0] != shape[1] or p.shape[1] > shape[2] or p.shape[2] > shape[3] for p in pictures
    ):
        raise ValueError(f'clean pictures must fit into the batch {shape}, got {[tuple(p.shape) for p in pictures]}')
    if all(tuple(p.shape) == shape[1:] for p in pictures):
        return torch.stack([p.to(like) for p in pictures]), None
    clean, inside = torch.zeros_like(like), like.new_zeros(shape[0], 1, *shape[2:])
    for i, picture in enumerate(pictures):
        clean[i, :, : picture.shape[1], : picture.shape[2]] = picture
        inside[i, :, : picture.shape[1], : picture.shape[2]] = 1
    return clean, inside


def _mean(values: Tensor, inside: Tensor | None) -> Tensor:
    return values.mean() if inside is None else (values * inside).sum() / (inside.sum() * values.shape[1]).clamp(min=1)
