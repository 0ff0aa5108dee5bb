"""What Restormer, Histoformer and TAT share: four levels down by pixel unshuffling, three up by pixel shuffling.

    picture -> 3x3 conv -> level 1 -> level 2 -> level 3 -> latent -> level 3 -> level 2 -> level 1 -> refinement -> sum
    width        d          d          2d         4d         8d        4d         2d         2d         2d

Each level is a row of blocks (B, C, H, W) -> (B, C, H, W), which a subclass chooses. Decoder levels 3 and 2 reduce the
concatenation of both maps by a 1x1 convolution, level 1 keeps it. Names of the parts, and with them the keys of a
state dict, are those of swz30/Restormer (academic public licence): published weights load as they are.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .pyramid import choose, positive

# B batch, C channels, H W size of the current level, h heads, d width of level 1

STRIDE = 8  # of the latent level
NORMS = ('with_bias', 'bias_free')


class BiasFreeNorm(nn.Module):
    """x / sqrt(var(x) + eps) over the last dimension, times a weight: the mean enters the variance alone."""

    def __init__(self, dim: int, *, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps)
        return x if self.weight is None else x * self.weight


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W).

    Args:
        norm: 'with_bias' (LayerNorm) or 'bias_free'.
        affine: learnt weight (and bias).
    """

    def __init__(self, dim: int, *, norm: str = 'with_bias', affine: bool = True):
        super().__init__()
        self.body: nn.Module
        if choose('norm', norm, NORMS) == 'with_bias':
            self.body = nn.LayerNorm(dim, elementwise_affine=affine)
        else:
            self.body = BiasFreeNorm(dim, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Projection(nn.Module):
    """3x3 convolution from the picture (key `proj`)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, 2C, H/2, W/2): 3x3 convolution to C/2, pixel unshuffle."""

    def __init__(self, dim: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C/2, 2H, 2W): 3x3 convolution to 2C, pixel shuffle."""

    def __init__(self, dim: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class UShaped(nn.Module):
    """Base of the restorers that are whole networks: a picture (B, C, H, W) in, the restored picture out.

    Any size: the picture is mirrored to a multiple of 8 to the right and below, as the authors' test programs do, and
    the result is cut.

    Args:
        encoder, decoder: (width, heads) -> one block of the encoder's levels 1 to 3, of the latent and decoder levels.
        dim: d, width of level 1.
        depths: blocks of levels 1, 2, 3 and latent; the decoder has as many.
        refinement: blocks after decoder level 1.
        num_heads: heads of levels 1, 2, 3 and latent.
        bias: convolutions have one.
        in_chans, out_chans: channels of the picture and of the result, which is added to the first `out_chans`.
        scale: super-resolution by this factor: pixel shuffle at the end, added to the bicubic enlargement.
    """

    min_dynamic_size = 32
    min_tile = 2 * STRIDE
    sizes = None  # any
    reduced = {'dim': 8, 'depths': (1, 1, 1, 1), 'refinement': 1}

    def __init__(
        self,
        *,
        encoder: Callable[[int, int], nn.Module],
        decoder: Callable[[int, int], nn.Module],
        dim: int,
        depths: Sequence[int],
        refinement: int,
        num_heads: Sequence[int],
        bias: bool,
        in_chans: int,
        out_chans: int,
        scale: int,
    ):
        super().__init__()
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(f'depths and num_heads need four entries, got {depths=}, {num_heads=}')
        if positive('out_chans', out_chans) > in_chans:
            raise ValueError(f'out_chans must not exceed in_chans={in_chans}, got {out_chans}')
        widths = [positive('dim', dim) * 2**level for level in range(4)]
        for level, heads in enumerate(num_heads):
            if heads < 1 or widths[level] % heads:
                raise ValueError(f'num_heads must divide the widths {widths}, got {tuple(num_heads)}')
        if dim % 4:
            raise ValueError(f'dim must be a multiple of 4 (pixel shuffling), got {dim}')
        self.in_chans, self.out_chans, self.scale = in_chans, out_chans, positive('scale', scale)
        self.grad_checkpointing = False
        wide = 2 * dim

        def row(block: Callable[[int, int], nn.Module], width: int, heads: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*[block(width, heads) for _ in range(depth)])

        self.patch_embed = Projection(in_chans, dim)
        self.encoder_level1 = row(encoder, widths[0], num_heads[0], depths[0])
        self.down1_2 = Downsample(widths[0])
        self.encoder_level2 = row(encoder, widths[1], num_heads[1], depths[1])
        self.down2_3 = Downsample(widths[1])
        self.encoder_level3 = row(encoder, widths[2], num_heads[2], depths[2])
        self.down3_4 = Downsample(widths[2])
        self.latent = row(decoder, widths[3], num_heads[3], depths[3])
        self.up4_3 = Upsample(widths[3])
        self.reduce_chan_level3 = nn.Conv2d(widths[3], widths[2], 1, bias=bias)
        self.decoder_level3 = row(decoder, widths[2], num_heads[2], depths[2])
        self.up3_2 = Upsample(widths[2])
        self.reduce_chan_level2 = nn.Conv2d(widths[2], widths[1], 1, bias=bias)
        self.decoder_level2 = row(decoder, widths[1], num_heads[1], depths[1])
        self.up2_1 = Upsample(widths[1])
        self.decoder_level1 = row(decoder, wide, num_heads[0], depths[0])
        self.refinement = row(decoder, wide, num_heads[0], refinement)
        self.output = nn.Conv2d(wide, out_chans * scale**2, 3, padding=1, bias=bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each row of blocks in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for layer-wise learning rates: the encoder from the picture down, then everything else."""
        return {'stem': r'^patch_embed', 'blocks': r'^(?:encoder_level|down)(\d)'}

    def run(self, row: nn.Sequential, x: Tensor) -> Tensor:
        """A row of blocks."""
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint(row, x, use_reentrant=False)
        return row(x)

    def entering(self, level: int, x: Tensor, images: Tensor) -> Tensor:
        """What enters encoder level 2, 3 or the latent level (4), after downsampling."""
        return x

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Pictures of a multiple of 8 -> first map, maps of levels 1 to 3, what enters the latent level."""
        first = self.patch_embed(images)
        maps = [self.run(self.encoder_level1, first)]
        maps.append(self.run(self.encoder_level2, self.entering(2, self.down1_2(maps[-1]), images)))
        maps.append(self.run(self.encoder_level3, self.entering(3, self.down2_3(maps[-1]), images)))
        return first, maps, self.entering(4, self.down3_4(maps[-1]), images)

    def decode(self, maps: Sequence[Tensor], latent: Tensor) -> Tensor:
        """Maps of levels 1 to 3 and what enters the latent level -> (B, 2d, H, W)."""
        x = self.up4_3(self.run(self.latent, latent))
        x = self.run(self.decoder_level3, self.reduce_chan_level3(torch.cat([x, maps[2]], 1)))
        x = self.up3_2(x)
        x = self.run(self.decoder_level2, self.reduce_chan_level2(torch.cat([x, maps[1]], 1)))
        x = self.run(self.decoder_level1, torch.cat([self.up2_1(x), maps[0]], 1))
        return self.run(self.refinement, x)

    def restore(self, images: Tensor) -> Tensor:
        """Pictures of a multiple of 8 -> restored, `scale` times as large."""
        _, maps, latent = self.encode(images)
        return self.finish(self.output(self.decode(maps, latent)), images)

    def finish(self, x: Tensor, images: Tensor) -> Tensor:
        """The last convolution's result, shuffled where it enlarges, plus the picture."""
        return F.pixel_shuffle(x, self.scale) + enlarge(images[:, : self.out_chans], self.scale)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, in_chans, H, W) float in [0, 1] -> (B, out_chans, scale H, scale W), not clamped."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f'images must be (B, {self.in_chans}, H, W), got {tuple(images.shape)}')
        height, width = images.shape[-2:]
        return self.restore(mirror(images, STRIDE))[..., : height * self.scale, : width * self.scale]


def require_static(name: str, images: Tensor) -> None:
    """ValueError where a program for any picture size is being exported: windows are laid out for one."""
    if not all(isinstance(side, int) for side in images.shape[-2:]):
        raise ValueError(
            f'{name} exports for one picture size alone (its windows are laid out for it): no dynamic_size'
        )


def mirror(images: Tensor, multiple: int) -> Tensor:
    """Mirrored to the right and below up to the next multiple (the edge pixel, where the picture is too small)."""
    for dim in (-2, -1):
        size = images.shape[dim]
        full = (size + multiple - 1) // multiple * multiple
        if isinstance(size, int) and full == size:
            continue  # symbolic sizes always take the index: one graph for every size
        index = torch.arange(full, device=images.device)
        index = torch.minimum(index, 2 * (size - 1) - index).clamp(min=0)
        images = images.index_select(dim, index)
    return images


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement by a whole factor; float32 at least (cubic sums cancel)."""
    if scale == 1:
        return images
    images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    return F.interpolate(images, scale_factor=scale, mode='bicubic', align_corners=False)
