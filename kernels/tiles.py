"""A picture of any size through a function that takes small ones: overlapping tiles, blended where they meet.

    out[p] = sum_t w_t[p] f(tile_t)[p] / sum_t w_t[p]

Along an axis a tile of T pixels starts every T - o pixels, the last one at the picture's end. w rises linearly from 0
to 1 over the middle half of the overlap o, so the outer quarter of a tile's overlap, where a network sees its padding,
does not count; at the picture's own edges w is 1. A function that looks no further than o / 4 pixels gives the same as
on the whole picture. Memory: the picture, the result, one number per pixel of it, and what the function needs for a
tile.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def run_tiles(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    tile: int,
    overlap: int | None = None,
    batch: int = 1,
    smallest: int = 1,
) -> Tensor:
    """Restores pictures of any size in tiles.

    Args:
        function: (n, C, h, w) -> (n, C', s h, s w), float, with one whole s for all; h = w = `tile`, or less where the
            picture has less. It may work on another device.
        images: (B, C, H, W) float.
        tile: side of the tiles, in pixels of the images.
        overlap: of neighbours, at most half the tile; by default a quarter of it.
        batch: tiles at once.
        smallest: side below which the function cannot work, for the message.

    Returns:
        (B, C', s H, s W), of the function's dtype (float32 at least), on the images' device.

    Raises:
        ValueError: tile, overlap or batch is out of range, or the function returns other sizes.
    """
    if images.ndim != 4:
        raise ValueError(f'images must be (B, C, H, W), got {tuple(images.shape)}')
    if tile < max(smallest, 1):
        raise ValueError(f'tile must be at least {max(smallest, 1)} pixels, the least this model works on, got {tile}')
    overlap = tile // 4 if overlap is None else overlap
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f'overlap must be in 0..{tile // 2}, at most half of {tile=}, got {overlap}')
    if batch < 1:
        raise ValueError(f'batch must be at least 1, got {batch}')
    height, width = images.shape[-2:]
    side = min(tile, height), min(tile, width)
    tops, lefts = (_starts(length, part, overlap) for length, part in ((height, side[0]), (width, side[1])))
    total = weights = None
    rows: dict[int, Tensor] = {}
    columns: dict[int, Tensor] = {}
    for group in _groups([(b, top, left) for b in range(len(images)) for top in tops for left in lefts], batch):
        crops = [images[b, :, top : top + side[0], left : left + side[1]] for b, top, left in group]
        out = function(torch.stack(crops)).to(images.device)
        scale = out.shape[-1] // side[1]
        if out.ndim != 4 or tuple(out.shape[-2:]) != (scale * side[0], scale * side[1]) or len(out) != len(group):
            wanted = f'({len(group)}, C, s {side[0]}, s {side[1]}) with a whole s'
            raise ValueError(f'function must return {wanted}, got {tuple(out.shape)}')
        out = out if out.dtype == torch.float64 else out.float()
        if total is None or weights is None:
            total = out.new_zeros(len(images), out.shape[1], scale * height, scale * width)
            weights = out.new_zeros(len(images), 1, scale * height, scale * width)
            rows = {top: _weight(top, side[0], height, overlap, scale).to(out) for top in tops}
            columns = {left: _weight(left, side[1], width, overlap, scale).to(out) for left in lefts}
        for (b, top, left), result in zip(group, out, strict=True):
            weight = rows[top][:, None] * columns[left]
            place = slice(scale * top, scale * (top + side[0])), slice(scale * left, scale * (left + side[1]))
            total[(b, slice(None), *place)] += result * weight
            weights[(b, slice(None), *place)] += weight
    if total is None or weights is None:
        raise ValueError(f'images must hold a picture, got {tuple(images.shape)}')
    return total.div_(weights)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `length`."""
    return [*range(0, length - tile, tile - overlap), length - tile]


def _groups(places: list[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _weight(start: int, tile: int, length: int, overlap: int, scale: int) -> Tensor:
    """(scale tile,) in 0..1: how much a tile counts along one axis."""
    place = (torch.arange(scale * tile) + 0.5) / scale
    weight = torch.ones(scale * tile)
    margin, ramp = overlap / 4, max(overlap / 2, 1e-6)
    if start > 0:
        weight = ((place - margin) / ramp).clamp(0, 1)
    if start + tile < length:
        weight = torch.minimum(weight, ((tile - place - margin) / ramp).clamp(0, 1))
    return weight
