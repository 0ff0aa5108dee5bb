"""MAT: mask-aware transformer for large-hole inpainting (Li et al. 2022, arXiv 2203.15270).

First a convolutional encoder, five transformer stages that attend to known pixels alone while holes close from their
rims, and a decoder whose convolutions are modulated by a style; then a second, convolutional network refines. Authors'
code: fenglinglwb/MAT (CC BY-NC 4.0), whose keys are ours.

Differs: pictures are in [0, 1] and of any size (what is added to the right and below is a hole), with the mask as their
last channel; in evaluation the style mixing takes its mean instead of drawing (`draw=True` draws, as the authors'
program always does), and so do the noise and the latent code, so that a result is repeatable. Theirs is trained as a
GAN; here the reconstruction loss of `OwnRestorer` trains it. Published .pkl files hold classes: save their
`G_ema.state_dict()` with the authors' code first, then `load_checkpoint(model, file)`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mat_layers import MATLayer, PartialConv, ScaledConv, ScaledLinear, leaky, resampled_conv, smoothing_filter
from .ushaped import require_static

# B batch, C channels, H W size of the current level, d width of the first stage, s length of a style

BASE = 64  # side of the map that the first and the last transformer stage see
STAGES = (  # depth, window, step
    (2, 8, 'same'),
    (3, 16, 'down'),
    (4, 16, 'down'),
    (3, 16, 'up'),
    (2, 8, 'up'),
)
CHANNELS = {512: 64, 256: 128, 128: 256}  # of the second stage by side; 512 channels below


class ModulatedConv(nn.Module):
    """A convolution whose input channels a style scales, renormalised to unit variance (StyleGAN2).

    Written as conv(x * s) * d instead of scaling the weights per picture, which gives the same with one group.
    """

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, style: int, *, demodulate: bool = True, up: int = 1):
        super().__init__()
        self.demodulate, self.up = demodulate, up
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, size, size))
        self.gain = 1 / math.sqrt(inputs * size**2)
        self.register_buffer('resample_filter', smoothing_filter())
        self.affine = ScaledLinear(style, inputs, bias=1.0)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """(B, C, H, W), (B, s) -> (B, O, up H, up W)."""
        scale, weight = self.affine(style), self.weight[0] * self.gain
        x = resampled_conv(x * scale[..., None, None], weight, self.resample_filter, up=self.up)
        if self.demodulate:
            power = scale.square() @ weight.square().sum((2, 3)).t()  # (B, O)
            x = x * torch.rsqrt(power + 1e-8)[..., None, None]
        return x


class StyledConv(nn.Module):
    """Modulated convolution, noise (drawn in training, if any), bias, leaky ReLU."""

    noise_const: Tensor

    def __init__(
        self, inputs: int, outputs: int, style: int, *, demodulate: bool = True, up: int = 1, noise: int | None = None
    ):
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, style, demodulate=demodulate, up=up)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise = noise is not None
        if noise is not None:
            self.register_buffer('noise_const', torch.randn(noise, noise))
            self.noise_strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.conv(x, style)
        if self.noise and self.training:
            x = x + torch.randn_like(x[:, :1]) * self.noise_strength
        elif self.noise and self.noise_const.shape == x.shape[2:]:
            x = x + self.noise_const * self.noise_strength
        return leaky(x + self.bias[:, None, None])


class ToPicture(nn.Module):
    """Modulated 1x1 convolution to the picture's channels, plus the coarser picture, enlarged."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, style: int):
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 1, style, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer('resample_filter', smoothing_filter())

    def forward(self, x: Tensor, style: Tensor, coarse: Tensor | None) -> Tensor:
        x = self.conv(x, style) + self.bias[:, None, None]
        if coarse is None:
            return x
        if coarse.shape[-1] != x.shape[-1]:
            kernel = (4 * self.resample_filter).to(x.dtype).expand(coarse.shape[1], 1, 4, 4)
            coarse = F.conv_transpose2d(coarse, kernel, stride=2, padding=1, groups=coarse.shape[1])
        return x + coarse


class StyledBlock(nn.Module):
    """Doubles the map (or keeps it), adds the encoder's map, and adds to the picture; one or three styles."""

    def __init__(
        self, inputs: int, outputs: int, chans: int, style: int, *, demodulate: bool, noise: int | None = None,
        first: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.conv0: nn.Module
        self.first = first
        if first:
            self.conv0 = ScaledConv(inputs, inputs)
        else:
            self.conv0 = StyledConv(inputs, outputs, style, demodulate=demodulate, up=2, noise=noise)
        self.conv1 = StyledConv(inputs if first else outputs, outputs, style, demodulate=demodulate, noise=noise)
        self.toRGB = ToPicture(outputs, chans, style)

    def forward(
        self, x: Tensor, skip: Tensor, picture: Tensor | None, styles: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Map, encoder's map, picture so far, styles of the three convolutions -> map, picture."""
        x = self.conv0(x) if self.first else self.conv0(x, styles[0])
        x = self.conv1(x + skip, styles[1])
        return x, self.toRGB(x, styles[2], picture)


class FirstStage(nn.Module):
    """The transformer part: picture in [-1, 1] with holes, mask, style codes -> picture.

    Args:
        resolution: side of the pictures it is made for: 128, 256, 512, ...; others must be multiples of it.
        dim: d.
        chans: of the picture.
        w_dim: length of a style code.
        demodulate: see `ModulatedConv`.
    """

    def __init__(
        self, *, resolution: int = 512, dim: int = 180, chans: int = 3, w_dim: int = 512, num_heads: int = 6,
        demodulate: bool = True,
    ):  # fmt: skip
        super().__init__()
        steps = _steps(resolution)
        self.draw = False
        self.conv_first = PartialConv(chans + 1, dim)
        self.enc_conv = nn.ModuleList(PartialConv(dim, dim, down=2) for _ in range(steps))
        self.tran = nn.ModuleList()
        size = BASE
        for depth, window, step in STAGES:
            size = {'same': size, 'down': size // 2, 'up': size * 2}[step]
            self.tran.append(
                MATLayer(dim, num_heads, depth=depth, window=window, size=size, up=2 if step == 'up' else 1,
                         down=2 if step == 'down' else 1)
            )  # fmt: skip
        # the map in the middle is 16 x 16: four halvings and a mean
        self.down_conv = nn.Sequential(*[ScaledConv(dim, dim, down=2) for _ in range(4)], nn.AdaptiveAvgPool2d(1))
        self.to_style = ScaledLinear(dim, 2 * dim, leak=True)
        self.ws_style = ScaledLinear(w_dim, dim, leak=True)
        self.to_square = ScaledLinear(dim, 256, leak=True)
        self.dec_conv = nn.ModuleList(
            StyledBlock(dim, dim, chans, 3 * dim, demodulate=demodulate) for _ in range(steps)
        )

    def forward(self, images: Tensor, masks: Tensor, codes: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], masks (B, 1, H, W), codes (B, n, w_dim) -> (B, 3, H, W)."""
        x, mask = self.conv_first(torch.cat([masks - 0.5, images * masks], 1), masks)
        skips = [x]
        for layer in self.enc_conv:
            x, mask = layer(x, mask)
            skips.append(x)
        skips.pop()  # the last one goes on
        coarse = []
        middle = len(self.tran) // 2
        for layer in self.tran[:middle]:
            x, mask = layer(x, mask)
            coarse.append(x)
        x, _ = self.tran[middle](x, None)
        code = self.ws_style(codes[:, -1])
        x = mix(x, self.noise(code, x), draw=self.draw or self.training)
        style = torch.cat([self.to_style(self.down_conv(x).flatten(1)), code], 1)
        for layer in self.tran[middle + 1 :]:
            x, _ = layer(x, None)
            x = x + coarse.pop()
        picture = None
        for layer in self.dec_conv:
            x, picture = layer(x, skips.pop(), picture, (style, style, style))
        assert picture is not None  # resolution is above BASE
        return picture * (1 - masks) + images * masks

    def noise(self, code: Tensor, like: Tensor) -> Tensor:
        """(B, d) -> (B, 1, H, W): 256 values stretched over the map, row by row."""
        height, width = like.shape[-2:]
        row = F.interpolate(self.to_square(code)[:, None], size=height * width, mode='linear', align_corners=False)
        return row.unflatten(-1, (height, width))


class _FromPicture(nn.Module):
    """Two convolutions; the first may halve the map."""

    def __init__(self, inputs: int, outputs: int, size: int, down: int):
        super().__init__()
        self.conv0 = ScaledConv(inputs, outputs, size, down=down)
        self.conv1 = ScaledConv(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv0(x))


class _ToStyle(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Sequential(*[ScaledConv(inputs, inputs, down=2) for _ in range(3)])
        self.fc = ScaledLinear(inputs, outputs, leak=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


class Synthesis(nn.Module):
    """Both stages: picture in [-1, 1] with holes, mask, style codes -> picture.

    Args:
        resolution, dim, chans, w_dim, demodulate: see `FirstStage`.
        channels: most channels of the second stage.
        noise: the second stage adds noise.
    """

    def __init__(
        self, *, resolution: int, dim: int, chans: int, w_dim: int, num_heads: int, channels: int, demodulate: bool,
        noise: bool,
    ):  # fmt: skip
        super().__init__()
        self.draw = False
        self.first_stage = FirstStage(
            resolution=resolution, dim=dim, chans=chans, w_dim=w_dim, num_heads=num_heads, demodulate=demodulate
        )
        sides = [2**power for power in range(4, 6 + _steps(resolution) + 1)]  # 16, 32, ..., resolution
        widths = {side: min(CHANNELS.get(side, 512), channels) for side in sides}
        self.sides = sides
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for side in reversed(sides):
            whole = side == resolution
            self.enc[f'EncConv_Block_{side}x{side}'] = _FromPicture(
                2 * chans + 1 if whole else widths[2 * side], widths[side], 1 if whole else 3, 1 if whole else 2
            )
        deep = widths[16]
        self.to_square = ScaledLinear(w_dim, 256, leak=True)
        self.to_style = _ToStyle(deep, 2 * deep)
        for side in sides:
            self.dec[f'Dec_{side}x{side}'] = StyledBlock(
                widths.get(side // 2, deep), widths[side], chans, w_dim + 2 * deep, demodulate=demodulate,
                noise=side if noise else None, first=side == 16,
            )  # fmt: skip

    def forward(self, images: Tensor, masks: Tensor, codes: Tensor) -> Tensor:
        """As `FirstStage`."""
        filled = self.first_stage(images, masks, codes)
        x = torch.cat([masks - 0.5, filled, images * masks], 1)
        maps = []
        for block in self.enc.values():
            x = block(x)
            maps.append(x)
        square = self.to_square(codes[:, 0]).view(-1, 1, 16, 16)
        square = F.interpolate(square, size=x.shape[-2:], mode='bilinear', align_corners=False)
        x = mix(x, square, draw=self.draw or self.training)
        maps[-1] = x
        overall = self.to_style(x)
        picture = None
        for number, block in enumerate(self.dec.values()):
            # the first block has no styled convolution before the skip: its codes are 0 and 1
            places = (0, 0, 1) if number == 0 else tuple(2 * number - 1 + i for i in range(3))
            styles = tuple(torch.cat([codes[:, place], overall], 1) for place in places)
            x, picture = block(x, maps.pop(), picture, styles)
        assert picture is not None
        return picture * (1 - masks) + images * masks


class Mapping(nn.Module):
    """Latent codes (B, z) -> style codes (B, count, w_dim), by eight layers of their own learning rate."""

    w_avg: Tensor

    def __init__(self, *, z_dim: int, w_dim: int, count: int, layers: int = 8, rate: float = 0.01):
        super().__init__()
        self.count, self.layers = count, layers
        for number in range(layers):
            layer = ScaledLinear(z_dim if number == 0 else w_dim, w_dim, leak=True, rate=rate)
            setattr(self, f'fc{number}', layer)
        self.register_buffer('w_avg', torch.zeros(w_dim))

    def forward(self, z: Tensor) -> Tensor:
        x = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for number in range(self.layers):
            x = getattr(self, f'fc{number}')(x)
        if self.training:
            with torch.no_grad():
                self.w_avg.lerp_(x.mean(0).to(self.w_avg), 0.005)
        return x[:, None].expand(-1, self.count, -1)


class MAT(nn.Module):
    """The whole generator; `Restorer(backbone=dict(type=MAT, ...), head=dict(type=OwnRestorer, holes=True))`.

    Args:
        resolution: side it is made for; other pictures are extended, by holes, to a multiple of it.
        dim: width of the transformer part.
        channels: most channels of the second stage.
        chans: of the picture.
        w_dim, z_dim: lengths of style and latent codes.
        num_heads: of the transformer part.
        noise: the second stage adds noise.
        demodulate: see `ModulatedConv`.
        draw: draw latent code and style mixing in evaluation too: another result each time.
    """

    sizes = None  # any
    reduced = {'resolution': 128, 'dim': 12, 'channels': 8, 'w_dim': 8, 'z_dim': 8, 'num_heads': 3}

    def __init__(
        self,
        *,
        resolution: int = 512,
        dim: int = 180,
        channels: int = 512,
        chans: int = 3,
        w_dim: int = 512,
        z_dim: int = 512,
        num_heads: int = 6,
        noise: bool = True,
        demodulate: bool = True,
        draw: bool = False,
    ):
        super().__init__()
        self.resolution, self.chans, self.z_dim, self.draw = resolution, chans, z_dim, draw
        self.min_dynamic_size = self.min_tile = resolution  # one window in the middle of the network
        self.synthesis = Synthesis(
            resolution=resolution,
            dim=dim,
            chans=chans,
            w_dim=w_dim,
            num_heads=num_heads,
            channels=channels,
            demodulate=demodulate,
            noise=noise,
        )
        self.synthesis.draw = self.synthesis.first_stage.draw = draw
        self.mapping = Mapping(z_dim=z_dim, w_dim=w_dim, count=2 * (5 + _steps(resolution)) - 4)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] and mask (B, chans + 1, H, W) -> (B, chans, H, W); known pixels come back as they are."""
        if images.ndim != 4 or images.shape[1] != self.chans + 1:
            raise ValueError(
                f'images must be (B, {self.chans + 1}, H, W), the last channel 1 where the picture is known, '
                f'got {tuple(images.shape)}'
            )
        require_static('MAT', images)
        height, width = images.shape[-2:]
        full = [(side + self.resolution - 1) // self.resolution * self.resolution for side in (height, width)]
        padded = F.pad(images, (0, full[1] - width, 0, full[0] - height))
        mask = (padded[:, -1:] > 0.5).to(images.dtype)
        if self.training or self.draw:
            codes = self.mapping(torch.randn(images.shape[0], self.z_dim, device=images.device, dtype=images.dtype))
        else:
            codes = self.mapping.w_avg.to(images.dtype).expand(images.shape[0], self.mapping.count, -1)
        filled = self.synthesis(padded[:, :-1] * 2 - 1, mask, codes)
        filled = (filled[..., :height, :width] + 1) / 2
        known = mask[..., :height, :width]
        return filled * (1 - known) + images[:, :-1] * known


def mix(x: Tensor, noise: Tensor, *, draw: bool) -> Tensor:
    """Each value of (B, C, H, W) or the noise (B, 1, H, W), with equal chances; their mean if nothing is drawn."""
    keep = torch.rand_like(x).round() if draw else 0.5
    return x * keep + noise * (1 - keep)


def _steps(resolution: int) -> int:
    """How often the picture is halved before the transformer stages."""
    steps = round(math.log2(max(resolution, 1) / BASE))
    if steps < 1 or BASE * 2**steps != resolution:
        raise ValueError(f'resolution must be {2 * BASE} times a power of two, got {resolution}')
    return steps
