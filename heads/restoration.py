"""Restoration heads: `UNetRestorer`, a U-shaped decoder on any feature pyramid, and `OwnRestorer` for whole networks.

UNetRestorer: U-Net (Ronneberger et al. 2015) with the global residual of DnCNN (Zhang et al. 2017): the head has a
light convolutional encoder of its own at strides 1 and 2 (no backbone keeps those), the backbone's maps join at theirs,
and the last convolution starts at zero, so an untrained head returns the picture unchanged. No norm between the levels:
batch statistics hurt restoration. Its blocks are residual convolutions, Restormer's or Histoformer's.

Pictures are float (B, C, H, W) in [0, 1] of any size; all padding happens inside.
Targets: dicts with `clean` (C, h, w). Results: {'image': (C, h, w) float in [0, 1]}.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .histoformer import HistoformerBlock
from .losses import charbonnier, pearson
from .pyramid import FeatureInfo, PyramidInfo, Size, check_sizes, choose, positive
from .restormer import RestormerBlock
from .tat import TaskBalance
from .ushaped import enlarge

LOSSES = ('charbonnier', 'l1', 'mse', 'balanced')


class RestorationHead(nn.Module):
    """What the restoration heads share: the sum with the picture, the loss, the results.

    A subclass computes `forward(features, images)`, what is to be added to the picture.

    Args:
        in_chans: channels of the picture.
        scale: super-resolution by this whole factor: results, and `clean`, are so much larger than the picture; the
            sum is with its bicubic enlargement.
        holes: the images have one channel more, 1 where the picture is known and 0 in its holes (inpainting): known
            pixels come back as they are.
        loss: 'charbonnier', 'l1' or 'mse', averaged over the pixels of all pictures; 'balanced': L1 with a learnt
            weight for each picture (`TaskBalance` of TAT, for several tasks at once).
        pearson: weight of Histoformer's correlation loss, 1 in its paper.
    """

    def __init__(self, *, in_chans: int, scale: int, holes: bool, loss: str, pearson: float):
        super().__init__()
        self.in_chans, self.scale, self.holes = positive('in_chans', in_chans), positive('scale', scale), holes
        if holes and scale > 1:
            raise ValueError(f'holes are filled at the size of the picture, got {scale=}')
        self.loss_name = choose('loss', loss, LOSSES)
        if pearson < 0:
            raise ValueError(f'pearson must not be negative, got {pearson}')
        self.pearson = pearson
        self.balance = TaskBalance() if loss == 'balanced' else None

    def check(self, images: Tensor) -> None:
        """ValueError unless the images have the declared channels."""
        channels = self.in_chans + int(self.holes)
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f'images must be (B, {channels}, H, W), got {tuple(images.shape)}')

    def restore(self, features: Any, images: Tensor) -> Tensor:
        """Features and images -> restored pictures (B, in_chans, scale H, scale W), not clamped."""
        self.check(images)
        return self.keep(enlarge(images[:, : self.in_chans], self.scale) + self(features, images), images)

    def keep(self, restored: Tensor, images: Tensor) -> Tensor:
        """The restored picture with the known pixels as they were."""
        if not self.holes:
            return restored
        known = images[:, self.in_chans :]
        return images[:, : self.in_chans] * known + restored * (1 - known)

    def loss(self, features: Any, images: Tensor, targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """{'loss_<name>': scalar, ..., 'psnr': of the batch in dB, logged only}; only pixels inside `clean` count."""
        restored = self.restore(features, images).float()
        clean, inside = gather_clean([t['clean'] for t in targets], restored)
        difference = restored - clean
        if self.balance is not None:
            degraded = enlarge(images[:, : self.in_chans].float(), self.scale)
            distances = ((degraded - clean), (degraded - restored), difference)
            value = self.balance(*(_mean_each(d.abs(), inside) for d in distances))
        elif self.loss_name == 'charbonnier':
            value = _mean(charbonnier(difference), inside)
        else:
            value = _mean(difference.abs() if self.loss_name == 'l1' else difference.square(), inside)
        terms = {f'loss_{self.loss_name}': value}
        if self.pearson:
            terms['loss_pearson'] = self.pearson * pearson(restored, clean, inside)
        mse = _mean(difference.detach().square(), inside)
        return terms | {'psnr': -10 * torch.log10(mse.clamp(min=1e-10))}

    def predict(
        self,
        features: Any,
        images: Tensor,
        sizes: Sequence[Size],
        original_sizes: Sequence[Size] | None = None,
    ) -> list[dict[str, Tensor]]:
        """One {'image': (C, scale h, scale w) float in [0, 1]} per picture; h, w of `original_sizes` where given."""
        check_sizes(sizes, len(images), (images.shape[-2], images.shape[-1]), original_sizes)
        restored = self.restore(features, images).float().clamp(0, 1)
        results = []
        for i, (height, width) in enumerate(sizes):
            picture = restored[i, :, : height * self.scale, : width * self.scale]
            if original_sizes is not None and tuple(original_sizes[i]) != (height, width):
                size = tuple(side * self.scale for side in original_sizes[i])
                picture = F.interpolate(picture[None], size=size, mode='bicubic', align_corners=False, antialias=True)
                picture = picture[0].clamp(0, 1)
            results.append({'image': picture})
        return results


class OwnRestorer(RestorationHead):
    """Loss and results of a whole network: the 'backbone' is one of `Restormer`, `Histoformer`, `TAT`, `MAT`.

    Args:
        in_chans, scale, holes, loss, pearson: see `RestorationHead`; `scale` as the network has it. With `holes` the
            network takes in_chans + 1 channels.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        scale: int = 1,
        holes: bool = False,
        loss: str = 'l1',
        pearson: float = 0.0,
    ):
        super().__init__(in_chans=in_chans, scale=scale, holes=holes, loss=loss, pearson=pearson)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """The network's picture, and the images -> what it adds to them."""
        return self.restore(features, images) - enlarge(images[:, : self.in_chans], self.scale)

    def restore(self, features: Tensor, images: Tensor) -> Tensor:
        self.check(images)
        wanted = (images.shape[0], self.in_chans, self.scale * images.shape[2], self.scale * images.shape[3])
        # a comparison of symbolic sizes would fix them in an exported program
        if not torch.compiler.is_exporting() and tuple(features.shape) != wanted:
            raise ValueError(f'the network must return pictures {wanted}, got {tuple(features.shape)}')
        return self.keep(features, images)


class ResidualBlock(nn.Module):
    """x + conv3x3(GELU(conv3x3(x)))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(x)))


# name -> block on (B, C, H, W), from its width and heads
BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    'residual': lambda width, heads: ResidualBlock(width),
    'restormer': lambda width, heads: RestormerBlock(width, heads),
    'histoformer': lambda width, heads: HistoformerBlock(width, heads, expansion=2.5),  # a multiple of 4 for width 8 n
}


class Merge(nn.Module):
    """Coarse map up to the finer one's size (aligned at the top left), plus the finer map, then blocks."""

    def __init__(
        self, coarse: int, fine: int, channels: int, blocks: int, *, block: str = 'residual', num_heads: int = 1
    ):
        super().__init__()
        self.reduce = nn.Conv2d(coarse, channels, 1)
        self.lateral = nn.Conv2d(fine, channels, 1)
        self.blocks = nn.Sequential(*[BLOCKS[block](channels, num_heads) for _ in range(blocks)])

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


class UNetRestorer(RestorationHead):
    """Restoration head on any pyramid.

    Args:
        feature_info: channels and strides of the maps (strides 4 to 32, or any rising subset; 3 and more).
        in_chans: channels of the picture.
        channels: width at full resolution; half resolution has twice, everything coarser four times as many.
        blocks: blocks at full, half and each coarser resolution of the decoder.
        stem_blocks: residual blocks of the head's own encoder at full and half resolution.
        block: of the decoder: 'residual' (two 3x3 convolutions), 'restormer' or 'histoformer', with one head at full
            resolution, two at half, four below.
        scale, holes, loss, pearson: see `RestorationHead`. With `holes` give the backbone in_chans + 1 channels.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        in_chans: int = 3,
        channels: int = 24,
        blocks: Sequence[int] = (1, 1, 1),
        stem_blocks: Sequence[int] = (0, 1),
        block: str = 'residual',
        scale: int = 1,
        holes: bool = False,
        loss: str = 'charbonnier',
        pearson: float = 0.0,
    ):
        super().__init__(in_chans=in_chans, scale=scale, holes=holes, loss=loss, pearson=pearson)
        self.inputs = PyramidInfo.of(feature_info)
        if self.inputs.reduction()[0] < 3:
            raise ValueError(
                'feature_info must start at stride 3 or more (UNetRestorer has its own maps at 1 and 2), '
                f'got {self.inputs.reduction()}'
            )
        if len(blocks) != 3 or len(stem_blocks) != 2:
            raise ValueError(f'blocks needs three and stem_blocks two entries, got {blocks} and {stem_blocks}')
        choose('block', block, tuple(BLOCKS))
        if block == 'histoformer' and channels % 8:
            raise ValueError(f'channels must be a multiple of 8 for Histoformer blocks, got {channels}')
        full, half, deep = positive('channels', channels), 2 * channels, 4 * channels
        self.stem_full = nn.Sequential(
            nn.Conv2d(in_chans + int(holes), full, 3, padding=1),
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
            Merge(
                outs[i + 1] if i + 1 < len(outs) else widths[-1],
                widths[i],
                outs[i],
                blocks[min(i, 2)],
                block=block,
                num_heads=(1, 2, 4)[min(i, 2)],
            )
            for i in range(len(outs))
        )
        self.last = nn.Conv2d(full, in_chans * scale**2, 3, padding=1)
        self._init_weights()

    def _init_weights(self) -> None:
        """Maps keep about unit variance down to the last convolution, whatever the depth."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_in', nonlinearity='linear')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Merge):  # two summands
                module.reduce.weight.data.mul_(0.5**0.5)
                module.lateral.weight.data.mul_(0.5**0.5)
            elif isinstance(module, ResidualBlock):  # close to the identity
                module.conv2.weight.data.mul_(0.1)
            elif isinstance(module, RestormerBlock):
                module.attn.project_out.weight.data.mul_(0.1)
                module.ffn.project_out.weight.data.mul_(0.1)
            elif isinstance(module, HistoformerBlock):
                module.attn_g.project_out.weight.data.mul_(0.1)
                module.ffn.project_out.weight.data.mul_(0.1)
        nn.init.zeros_(self.last.weight)

    def forward(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Maps and images (B, C, H, W) in [0, 1] -> what to add to the pictures (B, C, scale H, scale W)."""
        self.inputs.check(features)
        self.check(images)
        full = self.stem_full(images)
        height, width = images.shape[-2:]
        # Ceil-first, so that the same expression exports with dynamic sizes.
        bottom, right = (height + 1) // 2 * 2 - height, (width + 1) // 2 * 2 - width
        levels = [full, self.stem_half(F.pad(full, (0, right, 0, bottom))), *features]
        x = levels[-1]
        for i in reversed(range(len(self.merges))):
            x = self.merges[i](x, levels[i], self.strides[i + 1] / self.strides[i])
        return F.pixel_shuffle(self.last(x), self.scale)


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


def _mean_each(values: Tensor, inside: Tensor | None) -> Tensor:
    """(B, C, H, W) -> mean of each picture (B,)."""
    if inside is None:
        return values.mean((1, 2, 3))
    return (values * inside).sum((1, 2, 3)) / (inside.sum((1, 2, 3)) * values.shape[1]).clamp(min=1)
