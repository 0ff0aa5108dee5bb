"""Pictures of what became of a picture's tokens, block by block.

Patches of one token are painted in their mean colour, with a white line around each token of several patches; patches
that were dropped are dark. So the map of a block shows the picture as the block after it sees it.
"""

# H W size of the picture, h w of the grid of patches
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .visualize import as_pixels, grid

_LINE = (255, 255, 255)
_DROPPED = 0.25  # brightness that is left of a dropped patch


def draw_tokens(image: Tensor | np.ndarray, maps: Sequence[Tensor], patch: int, *, legible: int = 256) -> np.ndarray:
    """A sheet: the picture, then one panel for each different map, in order.

    Args:
        image: as in `visualize.draw`, as the network sees it but without its padding.
        maps: of one picture, (h, w) int64 per block: the token that each patch is part of, -1 for none; see
            `backbones.reduction.token_maps`.
        patch: pixels of a patch's side.
        legible: shorter side of a panel at least; small pictures are enlarged by a whole factor.

    Returns:
        uint8 (., ., 3) RGB.

    Raises:
        ValueError: the maps do not cover the picture.
    """
    pixels = as_pixels(image)
    panels = [pixels]
    before: Tensor | None = None
    for numbers in maps:
        if numbers.shape[0] * patch < pixels.shape[0] or numbers.shape[1] * patch < pixels.shape[1]:
            raise ValueError(
                f'maps of {patch} pixels a patch must cover {pixels.shape[:2]} pixels, got {tuple(numbers.shape)}'
            )
        if before is None or not torch.equal(_groups(before), _groups(numbers)):
            panels.append(_painted(pixels, numbers.numpy(), patch))
        before = numbers
    factor = max(1, -(-legible // min(pixels.shape[:2])))
    return grid([panel.repeat(factor, 0).repeat(factor, 1) for panel in panels])


def _groups(numbers: Tensor) -> Tensor:
    """The same for maps that put the same patches together, whatever they call the tokens."""
    flat = numbers.flatten()
    first = torch.full((int(flat.max()) + 2,), len(flat)).scatter_reduce(
        0, flat + 1, torch.arange(len(flat)), 'amin', include_self=True
    )
    return torch.where(flat < 0, -1, first[flat + 1])


def _painted(pixels: np.ndarray, numbers: np.ndarray, patch: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    of_pixel = numbers.repeat(patch, 0).repeat(patch, 1)[:height, :width]
    flat = of_pixel.reshape(-1) + 1
    counts = np.bincount(flat)
    sums = np.stack([np.bincount(flat, pixels[..., c].reshape(-1).astype(float)) for c in range(3)], 1)
    means = sums / np.maximum(counts, 1)[:, None]
    painted = means[flat].reshape(pixels.shape)
    sizes = np.bincount(numbers.reshape(-1) + 1)
    alone = (sizes[of_pixel + 1] == 1)[..., None]
    painted = np.where(alone, pixels, painted)
    painted = np.where((of_pixel < 0)[..., None], pixels * _DROPPED, painted)
    painted[_between(of_pixel) & ~alone[..., 0]] = _LINE
    return painted.round().astype(np.uint8)


def _between(numbers: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour is of another token."""
    line = np.zeros(numbers.shape, bool)
    line[:, :-1] |= numbers[:, 1:] != numbers[:, :-1]
    line[:-1] |= numbers[1:] != numbers[:-1]
    return line
