"""PSNR and SSIM as the restoration literature computes them, and what simple filters reach on the same pictures.

Source: BasicSR (github.com/XPixelGroup/BasicSR, Apache-2.0), basicsr/metrics/psnr_ssim.py; its numbers are reproduced:
images rounded to 8 bits, the border cut first, Y of ITU-R BT.601 in float32 and not rounded, SSIM with an 11x11
Gaussian window (sigma 1.5) on its valid area, K1 = 0.01, K2 = 0.03, averaged over channels, then over images.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from ...data.degradations import gaussian_blur
from .base import Metric

BLUR_SIGMAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
NLM_STRENGTHS = (6, 10, 14, 18, 24, 30)
_BASELINES = ('input', 'blur', 'nlm', 'telea')


class RestorationMetric(Metric):
    """'psnr' (dB), 'ssim', and for each baseline its own figure and the distance to it.

    'input': 'psnr_input', 'psnr_gain' (over the degraded input).
    'blur': 'psnr_blur', 'psnr_over_blur': Gaussian blur, with the one sigma of BLUR_SIGMAS that is best over the set.
    'nlm': 'psnr_nlm', 'psnr_over_nlm': OpenCV's fastNlMeansDenoisingColored (windows 7 and 21), best of NLM_STRENGTHS.
    'telea': 'psnr_telea', 'psnr_over_telea': OpenCV's inpainting after Telea (2004), for images with a mask.
    A smaller image (super-resolution) is enlarged bicubically first; of an image with a mask (inpainting) the picture.
    Choosing on the set itself favours the baselines. They are computed once per picture and kept for later validations.

    Results need `image` (3, H, W) in [0, 1]; targets `clean` (3, H, W) in [0, 1].

    Args:
        crop_border: pixels cut from each side before measuring.
        y_channel: measure luminance only.
        baselines: any of 'input', 'blur', 'nlm', 'telea'.
    """

    def __init__(
        self, *, crop_border: int = 0, y_channel: bool = False, baselines: Sequence[str] = ('input', 'blur', 'nlm')
    ) -> None:
        super().__init__()
        if set(baselines) - set(_BASELINES):
            raise ValueError(f'baselines must be of {", ".join(_BASELINES)}, got {baselines=}')
        if crop_border < 0:
            raise ValueError(f'crop_border must be 0 or more pixels, got {crop_border=}')
        self.crop_border = crop_border
        self.y_channel = y_channel
        self.baselines = tuple(baselines)
        self._known: dict[int, dict[str, list[float]]] = {}

    def measure(self, image: Any, target: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """PSNR and SSIM of the result, PSNR of each candidate of each baseline."""
        clean, restored = to_pixels(target['clean']), to_pixels(result['image'])
        if clean.shape != restored.shape:
            raise ValueError(
                f'{target.get("file", "image")}: the restored picture has size {restored.shape[:2]}, '
                f'the clean one {clean.shape[:2]}'
            )
        options: dict[str, Any] = {'crop_border': self.crop_border, 'y_channel': self.y_channel}
        measurement: dict[str, Any] = {
            'psnr': psnr(restored, clean, **options),
            'ssim': ssim(restored, clean, **options),
        }
        if self.baselines:
            degraded = _at_size(torch.as_tensor(image).detach().float().cpu(), target['clean'])
            key = zlib.crc32(clean.tobytes(), zlib.crc32(degraded.numpy().tobytes()))
            if key not in self._known:
                self._known[key] = {
                    name: [psnr(candidate, clean, **options) for candidate in _CANDIDATES[name](degraded)]
                    for name in self.baselines
                }
            measurement |= self._known[key]
        return measurement

    def summarise(self, measurements: list[dict[str, Any]]) -> dict[str, float]:
        """Means over images; for each baseline the candidate that is best in the mean."""
        metrics = {name: float(np.mean([one[name] for one in measurements])) for name in ('psnr', 'ssim')}
        for name in self.baselines:
            best = float(np.mean([one[name] for one in measurements], axis=0).max())
            metrics[f'psnr_{name}'] = best
            metrics['psnr_gain' if name == 'input' else f'psnr_over_{name}'] = metrics['psnr'] - best
        return metrics


def to_pixels(image: Any) -> np.ndarray:
    """(C, H, W) in [0, 1] -> uint8 (H, W, C), clamped and rounded."""
    pixels = torch.as_tensor(image).detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def psnr(first: np.ndarray, second: np.ndarray, *, crop_border: int = 0, y_channel: bool = False) -> float:
    """10 log10(255^2 / mean squared error) in dB; inf for equal pictures.

    Args:
        first, second: (H, W, C), values 0..255 (uint8 or float), RGB.
        crop_border: pixels cut from each side first.
        y_channel: compare luminance only (C = 3).
    """
    first, second = _prepared(first, second, crop_border, y_channel)
    error = float(((first - second) ** 2).mean())
    return 10 * float(np.log10(255.0**2 / error)) if error else float('inf')


def ssim(first: np.ndarray, second: np.ndarray, *, crop_border: int = 0, y_channel: bool = False) -> float:
    """Structural similarity (Wang et al., 2004), at most 1; arguments as `psnr`; sides >= 11 after the crop."""
    first, second = _prepared(first, second, crop_border, y_channel)
    if min(first.shape[:2]) < 11:
        raise ValueError(f'ssim needs pictures of at least 11x11 after cutting {crop_border=}, got {first.shape[:2]}')
    return float(np.mean([_ssim_plane(first[..., c], second[..., c]) for c in range(first.shape[2])]))


def _ssim_plane(x: np.ndarray, y: np.ndarray) -> float:
    """Mean SSIM of two float64 planes: (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2))."""
    window = cv2.getGaussianKernel(11, 1.5)

    def local_mean(plane: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(plane, -1, window, window)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _prepared(
    first: np.ndarray, second: np.ndarray, crop_border: int, y_channel: bool
) -> tuple[np.ndarray, np.ndarray]:
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f'two (H, W, C) pictures of one size are needed, got {first.shape=}, {second.shape=}')
    if y_channel and first.shape[2] != 3:
        raise ValueError(f'y_channel needs RGB pictures, got {first.shape[2]} channels')
    if 2 * crop_border >= min(first.shape[:2]):
        raise ValueError(f'{crop_border=} leaves nothing of a picture of size {first.shape[:2]}')
    cut = slice(crop_border, -crop_border or None)
    pair = (first[cut, cut], second[cut, cut])
    if y_channel:
        pair = (luminance(pair[0]), luminance(pair[1]))
    return pair[0].astype(np.float64), pair[1].astype(np.float64)


def luminance(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB 0..255 -> (H, W, 1) float32 Y in 16..235 (BT.601 studio swing), not rounded."""
    unit = pixels.astype(np.float32) / 255
    y = unit @ np.array([65.481, 128.553, 24.966], dtype=np.float64) + 16
    return (y / 255).astype(np.float32)[..., None] * 255


# -------------------------------------------------------------------------------------------------- baselines


def _at_size(image: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """An image as large as `clean`, its mask kept."""
    if image.shape[-2:] != clean.shape[-2:]:
        size = (int(clean.shape[-2]), int(clean.shape[-1]))
        image = F.interpolate(image[None], size=size, mode='bicubic', align_corners=False)[0]
    return image.contiguous()


def _picture(degraded: torch.Tensor) -> torch.Tensor:
    """The picture without its mask."""
    return degraded[:3] if degraded.shape[0] == 4 else degraded


def _telea(degraded: torch.Tensor) -> list[np.ndarray]:
    if degraded.shape[0] not in (2, 4):
        raise ValueError(f"baseline 'telea' needs images whose last channel is a mask, got {tuple(degraded.shape)}")
    hole = (degraded[-1] < 0.5).numpy().astype(np.uint8)
    return [cv2.inpaint(to_pixels(degraded[:-1]), hole, 3, cv2.INPAINT_TELEA).reshape(*hole.shape, -1)]


def _blurred(degraded: torch.Tensor) -> list[np.ndarray]:
    return [to_pixels(gaussian_blur(_picture(degraded), sigma)) for sigma in BLUR_SIGMAS]


def _non_local_means(degraded: torch.Tensor) -> list[np.ndarray]:
    pixels = to_pixels(_picture(degraded))
    if pixels.shape[2] == 1:
        return [cv2.fastNlMeansDenoising(pixels, None, h, 7, 21)[..., None] for h in NLM_STRENGTHS]
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    return [cv2.fastNlMeansDenoisingColored(bgr, None, h, h, 7, 21)[..., ::-1] for h in NLM_STRENGTHS]


_CANDIDATES: dict[str, Callable[[torch.Tensor], list[np.ndarray]]] = {
    'input': lambda degraded: [to_pixels(_picture(degraded))],
    'blur': _blurred,
    'nlm': _non_local_means,
    'telea': _telea,
}
