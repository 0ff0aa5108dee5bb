"""Scenes for detection, instance and semantic segmentation: scanned digits written on crops of photographs.

A scan is upsampled smoothly (x10), sharpened so that the small holes of 6, 8 and 9 stay open, slanted and stretched a
little, and cut at half ink: with v the upsampled ink and t the cut, the signed distance to the outline is about
(v - t) / |grad v| pixels, and alpha = clip(distance + 1/2, 0, 1) is an outline of one pixel's softness. The mask is
alpha > 1/2, the box is the mask's extent, the area its pixel count: exact by construction. Ink is dark on light ground
and light on dark ground, and digits keep to places where most of the ground contrasts with it.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image

from .sources import digits, photograph, split

_ZOOM = 10  # canvas pixels per scan pixel
_MARGIN = 1  # empty scan pixels around the scan
_FINE, _COARSE = 0.5, 1.2  # standard deviations (scan pixels) of the two kernels: ink = 2 fine - coarse
_CUT = 0.5  # ink above this is the digit
_GAP = 2  # background pixels that stay between two digits
_CONTRAST = 95  # least luminance difference (0..255) between ink and the mean ground under it
_VISIBLE = 60  # a ground pixel this far from the ink shows the outline
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digit:
    """One digit in a scene: `label` 0..9, `scan` its index in `digits()`, `mask` (H, W) bool over the whole scene."""

    label: int
    scan: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) of the mask, whole pixels."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """`image` (H, W, 3) uint8 RGB, its `digits` (complete, never touching), the `photograph` behind them."""

    image: np.ndarray
    digits: list[Digit]
    photograph: str


def draw_scene(
    *,
    seed: tuple[int, ...],
    part: str,
    size: int = 96,
    counts: tuple[int, int] = (2, 5),
    heights: tuple[int, int] = (22, 44),
) -> Scene:
    """Draw one scene, a function of its arguments alone.

    Args:
        seed: integers that seed this scene.
        part: 'train' or 'val': whose photographs and scans are used.
        size: side of the square picture in pixels.
        counts: fewest and most digits aimed at; where the last ones find no room there are fewer, but at least one.
        heights: smallest and largest height of a digit in pixels.
    """
    rng = np.random.default_rng(seed)
    names, scans = split()['photographs'][part], split()['digits'][part]
    name = names[int(rng.integers(len(names)))]
    canvas = _crop(photograph(name), size, rng).astype(np.float32)
    taken = np.zeros((size, size), dtype=bool)
    drawn: list[Digit] = []
    wanted = int(rng.integers(counts[0], counts[1] + 1))
    for _ in range(wanted):
        scan = scans[int(rng.integers(len(scans)))]
        tallest = heights[1] if wanted <= 3 else (heights[0] + heights[1]) // 2 + 3
        for attempt in range(40):  # smaller with every attempt, so that nearly all find room
            height = int(rng.integers(heights[0], max(heights[0], tallest - attempt) + 1))
            alpha = glyph(scan, height, slant=rng.uniform(-0.18, 0.18), stretch=rng.uniform(0.9, 1.15))
            rows, columns = alpha.shape
            if rows > size - 2 or columns > size - 2:
                continue
            y, x = int(rng.integers(1, size - rows)), int(rng.integers(1, size - columns))
            spot = np.s_[y : y + rows, x : x + columns]
            if (taken[spot] & (alpha > 0)).any():
                continue
            ink, visible = _ink(canvas[spot], alpha, rng)
            if visible < 0.8 and (drawn or attempt < 20):
                continue
            canvas[spot] += alpha[..., None] * (ink - canvas[spot])
            mask = np.zeros_like(taken)
            mask[spot] = alpha > 0.5
            taken |= _dilate(mask, _GAP)
            drawn.append(Digit(label=int(digits().labels[scan]), scan=scan, mask=mask))
            break
    return Scene(image=np.rint(canvas).clip(0, 255).astype(np.uint8), digits=drawn, photograph=name)


def glyph(scan: int, height: int, *, slant: float = 0.0, stretch: float = 1.0) -> np.ndarray:
    """Anti-aliased alpha in [0, 1] (height + 2, w) float32 of one scan; its mask `alpha > 0.5` is `height` tall (+-1).

    Args:
        scan: index in `digits()`.
        height: of the digit in pixels.
        slant: horizontal shift per row, positive leans to the right.
        stretch: factor on the width.
    """
    canvas, (top, bottom) = _canvas(scan)
    scale = (bottom - top) / height  # canvas pixels per pixel
    width = int(np.ceil(canvas.shape[1] / scale * stretch + abs(slant) * height)) + 2
    middle_x, middle_y = width / 2, height / 2 + 1
    # output pixel -> canvas position (PIL samples at pixel centres)
    a, b = scale / stretch, slant * scale / stretch
    affine = (a, b, canvas.shape[1] / 2 - a * middle_x - b * middle_y, 0.0, scale, top - scale)
    picture = Image.fromarray(canvas).transform(
        (width, height + 2), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    ink = np.asarray(picture)
    slope = np.hypot(*np.gradient(ink))
    alpha = np.clip((ink - _CUT) / np.maximum(slope, 1e-3) + 0.5, 0, 1).astype(np.float32)
    alpha[ink < 0.1] = 0  # flat ground far from the outline has no slope to divide by
    filled = np.flatnonzero((alpha > 0).any(0))
    return alpha[:, filled[0] : filled[-1] + 1]


@functools.cache
def _canvas(scan: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The scan upsampled to a smooth float32 field and the rows [top, bottom) of its digit."""
    ink = np.pad(digits().ink[scan], _MARGIN)
    fine, coarse = (_upsampler(len(ink), sigma) for sigma in (_FINE, _COARSE))
    field = 2 * (fine @ ink @ fine.T) - coarse @ ink @ coarse.T
    rows = np.flatnonzero((field > _CUT).any(1))
    return field.astype(np.float32), (int(rows[0]), int(rows[-1]) + 1)


@functools.cache
def _upsampler(count: int, sigma: float) -> np.ndarray:
    """(count * zoom, count) weights: normalised Gaussian kernels about the scan's pixel centres."""
    position = (np.arange(count * _ZOOM) + 0.5) / _ZOOM
    weight = np.exp(-0.5 * ((position[:, None] - np.arange(count) - 0.5) / sigma) ** 2)
    return weight / weight.sum(1, keepdims=True)


def _crop(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of the photograph, 1 to 2.5 times `size`, mirrored half of the time, reduced to `size`."""
    height, width = picture.shape[:2]
    side = int(rng.uniform(size, max(size, min(2.5 * size, height, width))))
    side = min(side, height, width)
    y, x = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    crop = picture[y : y + side, x : x + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.asarray(Image.fromarray(np.ascontiguousarray(crop)).resize((size, size), Image.Resampling.LANCZOS))


def _ink(ground: np.ndarray, alpha: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A slightly tinted colour (3,) for `ground` (h, w, 3), and the share of the ground that it stands out from."""
    luminance = ground @ _LUMA
    level = float((luminance * alpha).sum() / alpha.sum())
    if level < 128:
        shade = rng.uniform(max(200, level + _CONTRAST), 255)
    else:
        shade = rng.uniform(0, min(55, level - _CONTRAST))
    colour = np.clip(shade + rng.uniform(-22, 22, size=3), 0, 255).astype(np.float32)
    return colour, float((np.abs(luminance - colour @ _LUMA) > _VISIBLE).mean())


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Square dilation of a boolean map."""
    grown = np.zeros_like(mask)
    padded = np.pad(mask, radius)
    height, width = mask.shape
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            grown |= padded[dy : dy + height, dx : dx + width]
    return grown
