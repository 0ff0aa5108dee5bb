"""Degradations that turn a clean photograph into a restorer's input: noise, blur, JPEG, rain, snow, haze, fewer pixels.

Each is a callable on a float32 image (3, H, W) or (1, H, W) in [0, 1] that returns a new tensor of the same shape and
dtype (clamped to [0, 1] unless said otherwise); `Downscale` returns a smaller one, `Holes` (holes.py) one more channel.
A parameter is a number or a range (low, high) drawn uniformly per
image. Every draw comes from torch's global generator, so that the dataset alone decides: it seeds it by (seed, draw) in
training, and by the index in evaluation, where the same photograph is always degraded alike.

In a config: dict(type=GaussianNoise, sigma=25), or several in a row with dict(type=Degrade, steps=[...]).
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import io

from .transforms import build

Range = float | tuple[float, float]


class _Degradation(abc.ABC):
    """A callable image -> image; `repr` shows its parameters."""

    @property
    def scale(self) -> int:
        """How many times smaller the result is."""
        return 1

    def __call__(self, image: Tensor) -> Tensor:
        """image: float (3, H, W) or (1, H, W) in [0, 1], RGB -> degraded, same shape, dtype and device."""
        if image.ndim != 3 or not image.is_floating_point():
            raise ValueError(
                f'{type(self).__name__} takes a float (C, H, W) image in [0, 1], got {tuple(image.shape)} {image.dtype}'
            )
        return self.degrade(image)

    @abc.abstractmethod
    def degrade(self, image: Tensor) -> Tensor:
        """The degradation itself, on a checked image."""

    def __repr__(self) -> str:
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in vars(self).items())})'


class GaussianNoise(_Degradation):
    """y = x + sigma / 255 * n, n ~ N(0, 1) for each pixel and channel.

    Args:
        sigma: standard deviation in units of 0..255.
        clip: clamp y to [0, 1], as a camera does. The denoising literature (DnCNN, SwinIR, Restormer) tests with False.
    """

    def __init__(self, *, sigma: Range = 25.0, clip: bool = True) -> None:
        self.sigma = _range('sigma', sigma, 0, 255)
        self.clip = clip

    def degrade(self, image: Tensor) -> Tensor:
        noisy = image + _draw(self.sigma) / 255 * torch.randn(image.shape, dtype=image.dtype).to(image.device)
        return noisy.clamp(0, 1) if self.clip else noisy


class PoissonNoise(_Degradation):
    """y = k / peak, k ~ Poisson(peak * x): shot noise, standard deviation sqrt(x / peak).

    Args:
        peak: photons that a pixel of value 1 collects; fewer is noisier.
    """

    def __init__(self, *, peak: Range = 30.0) -> None:
        self.peak = _range('peak', peak, 1e-3, 1e6)

    def degrade(self, image: Tensor) -> Tensor:
        peak = _draw(self.peak)
        return (torch.poisson(image.clamp(min=0).cpu() * peak) / peak).clamp(0, 1).to(image)


class Blur(_Degradation):
    """y = x * k (convolution, edge pixels repeated outwards); k sums to 1.

    Args:
        kind: 'gaussian' (isotropic, k ~ exp(-r^2 / 2 sigma^2)) or 'motion' (a straight line, evenly exposed).
        sigma: of the Gaussian, in pixels.
        length: of the line, in pixels.
        angle: of the line in degrees, 0 = horizontal, counter-clockwise.
    """

    def __init__(
        self,
        *,
        kind: str = 'gaussian',
        sigma: Range = (0.6, 2.5),
        length: Range = (5.0, 15.0),
        angle: Range = (0.0, 180.0),
    ) -> None:
        if kind not in ('gaussian', 'motion'):
            raise ValueError(f"kind must be 'gaussian' or 'motion', got {kind=}")
        self.kind = kind
        self.sigma = _range('sigma', sigma, 0.05, 50)
        self.length = _range('length', length, 1, 200)
        self.angle = _range('angle', angle, -360, 360)

    def degrade(self, image: Tensor) -> Tensor:
        if self.kind == 'gaussian':
            return gaussian_blur(image, _draw(self.sigma)).clamp(0, 1)
        return _filter(image, _line(_draw(self.length), _draw(self.angle))).clamp(0, 1)


class JPEG(_Degradation):
    """y = decode(encode(x)): real libjpeg, 8 bits, through torchvision.io.

    Args:
        quality: 1..100, rounded to a whole number.
    """

    def __init__(self, *, quality: Range = (10, 40)) -> None:
        self.quality = _range('quality', quality, 1, 100)

    def degrade(self, image: Tensor) -> Tensor:
        pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        decoded = io.decode_jpeg(io.encode_jpeg(pixels, quality=round(_draw(self.quality))))
        return (decoded[: len(pixels)].to(image) / 255).expand_as(image).contiguous()


class Rain(_Degradation):
    """y = 1 - (1 - x)(1 - strength * s): bright streaks s in [0, 1] screened over the picture.

    s is a random set of drops (each pixel is one with probability `density`, brightness uniform in [0.5, 1]) drawn out
    along a line of `length` pixels; all fall in about the same direction, as rain does.

    Args:
        density: drops per pixel.
        length: of a streak in pixels.
        angle: of the streaks in degrees, 90 = straight down.
        strength: 0..1.
    """

    def __init__(
        self,
        *,
        density: Range = (0.002, 0.008),
        length: Range = (9.0, 19.0),
        angle: Range = (70.0, 110.0),
        strength: Range = (0.5, 0.9),
    ) -> None:
        self.density = _range('density', density, 0, 1)
        self.length = _range('length', length, 1, 200)
        self.angle = _range('angle', angle, -360, 360)
        self.strength = _range('strength', strength, 0, 1)

    def degrade(self, image: Tensor) -> Tensor:
        streaks = _particles(image, _draw(self.density), _line(_draw(self.length), _draw(self.angle)))
        return 1 - (1 - image.clamp(0, 1)) * (1 - _draw(self.strength) * streaks)


class Snow(_Degradation):
    """y = (1 - m) x + 0.97 m: flakes; m is the largest of three layers of soft round dots, far (small) to near (large).

    Args:
        density: flakes per pixel in the far layer; the nearer layers hold a quarter and a sixteenth of it.
        radius: of the flakes in the near layer, in pixels; half and a quarter of it in the farther layers.
        strength: opacity of a flake's middle, 0..1.
    """

    def __init__(
        self, *, density: Range = (0.005, 0.02), radius: Range = (2.0, 4.5), strength: Range = (0.7, 1.0)
    ) -> None:
        self.density = _range('density', density, 0, 1)
        self.radius = _range('radius', radius, 0.2, 50)
        self.strength = _range('strength', strength, 0, 1)

    def degrade(self, image: Tensor) -> Tensor:
        density, radius, strength = _draw(self.density), _draw(self.radius), _draw(self.strength)
        cover = torch.zeros_like(image[:1])
        for layer in range(3):
            dot = _gaussian(max(radius / 2 ** (2 - layer) / 1.5, 0.3))
            cover = torch.maximum(cover, _particles(image, density / 4**layer, dot[:, None] * dot))
        cover = strength * cover
        return (1 - cover) * image.clamp(0, 1) + 0.97 * cover


class Haze(_Degradation):
    """y = x t + A (1 - t), t = exp(-beta d): Koschmieder's scattering model over an invented depth map.

    d in [0, 1] grows from the lower to the upper edge (as on a plain) plus smooth waves, scaled to fill [0, 1].

    Args:
        beta: density of the haze.
        airlight: A, its grey value, 0..1.
    """

    def __init__(self, *, beta: Range = (0.6, 1.8), airlight: Range = (0.75, 0.95)) -> None:
        self.beta = _range('beta', beta, 0, 20)
        self.airlight = _range('airlight', airlight, 0, 1)

    def degrade(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        waves = F.interpolate(torch.rand(1, 1, 4, 4), size=(height, width), mode='bicubic', align_corners=True)[0]
        depth = torch.linspace(1, 0, height)[None, :, None] + 0.5 * waves
        depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-6)
        transmission = torch.exp(-_draw(self.beta) * depth).to(image)
        return image.clamp(0, 1) * transmission + _draw(self.airlight) * (1 - transmission)


class Downscale(_Degradation):
    """(C, H, W) -> (C, floor(H / factor), floor(W / factor)) by antialiased bicubic interpolation.

    For super-resolution. What is left over at the right and lower edge is cut, from the clean picture too
    (`CleanFolder`).

    Args:
        factor: 2, 3, 4, ...
    """

    def __init__(self, *, factor: int = 2) -> None:
        if not isinstance(factor, int) or isinstance(factor, bool) or factor < 2:
            raise ValueError(f'factor must be a whole number of at least 2, got {factor=}')
        self.factor = factor

    @property
    def scale(self) -> int:
        return self.factor

    def degrade(self, image: Tensor) -> Tensor:
        height, width = (side // self.factor for side in image.shape[-2:])
        if not height or not width:
            raise ValueError(f'Downscale needs {self.factor} pixels at least each way, got {tuple(image.shape)}')
        cut = image[None, :, : height * self.factor, : width * self.factor]
        small = F.interpolate(cut, size=(height, width), mode='bicubic', align_corners=False, antialias=True)
        return small[0].clamp(0, 1)


class Degrade(_Degradation):
    """Several degradations, one after another.

    Args:
        steps: callables or configs such as dict(type=GaussianNoise, sigma=25).
    """

    def __init__(self, *, steps: Sequence[Callable[[Tensor], Tensor] | Mapping[str, Any]]) -> None:
        self.steps = [build(step, f'steps[{number}]') for number, step in enumerate(steps)]
        for number, step in enumerate(self.steps):
            if not callable(step):
                raise TypeError(f'steps[{number}] must be a callable or dict(type=..., ...), got {step!r}')

    @property
    def scale(self) -> int:
        return math.prod(getattr(step, 'scale', 1) for step in self.steps)

    def degrade(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


class RandomDegrade(Degrade):
    """One of several degradations, drawn per image with equal chances: for blind or all-in-one restoration."""

    def __init__(self, *, steps: Sequence[Callable[[Tensor], Tensor] | Mapping[str, Any]]) -> None:
        super().__init__(steps=steps)
        scales = {getattr(step, 'scale', 1) for step in self.steps}
        if len(scales) > 1:
            raise ValueError(f'steps must make pictures equally small, got factors {sorted(scales)}')

    @property
    def scale(self) -> int:
        return getattr(self.steps[0], 'scale', 1) if self.steps else 1

    def degrade(self, image: Tensor) -> Tensor:
        return self.steps[int(torch.randint(len(self.steps), ()))](image)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (C, H, W) with repeated edges; sigma in pixels, kernel cut at 4 sigma."""
    kernel = _gaussian(sigma)
    return _filter(_filter(image, kernel[None, :]), kernel[:, None])


# ------------------------------------------------------------------------------------------------------- parts


def _range(name: str, value: Range, low: float, high: float) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    numbers = len(pair) == 2 and all(isinstance(end, int | float) and not isinstance(end, bool) for end in pair)
    if not numbers or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(
            f'{name} must be a number or a range (low, high) within {low:g}..{high:g}, got {name}={value!r}'
        )
    return float(pair[0]), float(pair[1])


def _draw(bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low if low == high else low + (high - low) * float(torch.rand(()))


def _gaussian(sigma: float) -> Tensor:
    radius = max(1, math.ceil(4 * sigma))
    weight = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    return weight / weight.sum()


def _line(length: float, angle: float) -> Tensor:
    """A straight line of `length` pixels through the middle of an odd square kernel, anti-aliased, sum 1."""
    radius = math.ceil(length / 2)
    across = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(-across, across, indexing='ij')
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, aside = (x * cosine + y * sine).abs(), (x * sine - y * cosine).abs()
    line = (1 - aside).clamp(0, 1) * (length / 2 + 0.5 - along).clamp(0, 1)
    return line / line.sum()


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each channel of (C, H, W) with an odd kernel (h, w); edge pixels are repeated outwards."""
    vertical, horizontal = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(image[:, None], (horizontal, horizontal, vertical, vertical), mode='replicate')
    return F.conv2d(padded, kernel.to(image)[None, None])[:, 0]


def _particles(image: Tensor, density: float, shape: Tensor) -> Tensor:
    """(1, H, W) in [0, 1]: copies of `shape` (h, w, odd sides; scaled to a maximum of 1) about random pixels.

    Each pixel is a middle with probability `density`, with a brightness uniform in [0.5, 1]; middles lie outside the
    picture too, so that its edges are covered like its inside.
    """
    size = (1, 1, image.shape[-2] + shape.shape[0] - 1, image.shape[-1] + shape.shape[1] - 1)
    middles = (torch.rand(size) < density) * (0.5 + 0.5 * torch.rand(size))
    return F.conv2d(middles, (shape / shape.max())[None, None])[0].clamp(0, 1).to(image)
