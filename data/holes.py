"""Holes for inpainting: large ones, as MAT trains with (Li et al. 2022, arXiv 2203.15270): boxes and brush strokes.

The result has one channel more than the picture: 1 where it is known, 0 in a hole. In a config:
dict(type=Holes, share=(0.2, 0.6)), as the last of several steps.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .degradations import Range, _Degradation, _draw, _range

_TRIES = 200


class Holes(_Degradation):
    """(C, H, W) in [0, 1] -> (C + 1, H, W): holes are `fill`, and the last channel says where the picture is known.

    Args:
        share: of the picture that is missing; what is drawn comes as close to it as whole boxes and strokes allow.
        boxes: chance that the next hole is a box of up to half the height and width; else it is a brush stroke.
        fill: grey value in the holes, 0..1.
    """

    def __init__(self, *, share: Range = (0.2, 0.6), boxes: float = 0.5, fill: float = 0.0) -> None:
        self.share = _range('share', share, 0, 1)
        self.boxes = _range('boxes', boxes, 0, 1)[0]
        self.fill = _range('fill', fill, 0, 1)[0]

    def degrade(self, image: Tensor) -> Tensor:
        if image.shape[0] not in (1, 3):
            raise ValueError(f'Holes takes a picture of 1 or 3 channels and comes last, got {tuple(image.shape)}')
        known = self.draw(image.shape[-2], image.shape[-1]).to(image)
        return torch.cat([image * known + self.fill * (1 - known), known])

    def draw(self, height: int, width: int) -> Tensor:
        """A mask (1, H, W) float, 1 = known."""
        share = _draw(self.share)
        hole = np.full((height, width), share >= 1)
        for _ in range(_TRIES):
            missing = share - hole.mean()
            if missing < 0.02:
                break
            boxed = float(torch.rand(())) < self.boxes
            added = hole | (_box(height, width) if boxed else _stroke(height, width))
            if added.mean() <= share + 0.02:
                hole = added
        return torch.from_numpy(~hole)[None].float()


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, max(high, low) + 1, ()))


def _box(height: int, width: int) -> np.ndarray:
    """(H, W) bool: a box, which may reach over the edges."""
    rows, columns = _integer(1, height // 2), _integer(1, width // 2)
    top, left = _integer(-rows // 2, height - rows // 2), _integer(-columns // 2, width - columns // 2)
    hole = np.zeros((height, width), dtype=bool)
    hole[max(top, 0) : max(top + rows, 0), max(left, 0) : max(left + columns, 0)] = True
    return hole


def _stroke(height: int, width: int) -> np.ndarray:
    """(H, W) bool: a zigzag of a round brush, 4 to 18 corners, steps of about an eighth of the diagonal."""
    diagonal = math.hypot(height, width)
    brush = max(1, round(diagonal / 60 * (1 + 3 * float(torch.rand(())))))
    mean, spread = 2 * math.pi / 5, 2 * math.pi / 15
    corners = [(float(_integer(0, width)), float(_integer(0, height)))]
    for number in range(_integer(4, 18)):
        angle = mean + spread * (2 * float(torch.rand(())) - 1)
        angle = 2 * math.pi - angle if number % 2 else angle
        step = min(max(diagonal / 8 * (1 + 0.5 * float(torch.randn(()))), 0.0), diagonal / 4)
        x, y = corners[-1][0] + step * math.cos(angle), corners[-1][1] + step * math.sin(angle)
        corners.append((min(max(x, 0.0), width), min(max(y, 0.0), height)))
    picture = Image.new('1', (width, height))
    pen = ImageDraw.Draw(picture)
    pen.line(corners, fill=1, width=brush)
    for x, y in corners:
        pen.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=1)
    hole = np.array(picture)
    for axis in (0, 1):
        if float(torch.rand(())) < 0.5:
            hole = np.flip(hole, axis)
    return hole
