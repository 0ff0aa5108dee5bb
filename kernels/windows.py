"""Which tokens of a sparse map share a window, on the tokens' own device: windows that hold nothing do not exist.

    window(c) = floor((c - shift) / window)      along each spatial axis of a coordinate c

so the windows are those of `window_attention`, without its wrap around the border. `rotated_sets` cuts the tokens of
each window into sets of at most S, ordered by one axis and by the other: with n tokens there are K = ceil(n / S) sets,
and slot j of set k holds token floor((k S + j) n / (K S)) of the ordered window: equal work. Slots that are left over
repeat their neighbour, within a set only (n / (K S) exceeds (K - 1) / K): each token is in one set of each order.
Source of the sets: DSVT, arXiv 2301.06051; authors' code Haiyang-W/DSVT (Apache-2.0).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Tokens by window; what `sparse_window_attention` takes in place of `offsets`.

    Args:
        offsets: (W + 1,) int64; window w has the entries from offsets[w] to below offsets[w + 1].
        index: (E,) int64, the token of each entry.
        write: (E,) int64, the token whose result an entry gives, -1 for entries that are keys alone.
        places: (E,) int64, the place of each entry in its window in row order, from 0 to the window's volume - 1; or
            None, where windows have no places.
        longest: entries of the largest window.
    """

    offsets: Tensor
    index: Tensor
    write: Tensor
    places: Tensor | None
    longest: int

    def __len__(self) -> int:
        return self.offsets.numel() - 1


@dataclass(frozen=True)
class Sets:
    """Sets of equal size.

    Args:
        index: (2, K, S) int64, the token of each slot; the first ordered by the last axis but one (y), the second by
            the last one (x).
        repeated: (2, K, S) bool, the slots that hold the token of the slot before them.
    """

    index: Tensor
    repeated: Tensor

    def windows(self, axis: int) -> Windows:
        """The sets of one order, without their repetitions, as windows."""
        index, new = self.index[axis], ~self.repeated[axis]
        counts = new.sum(1)
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return Windows(offsets, index[new], index[new], None, int(counts.max()) if len(counts) else 0)


def build_windows(
    coords_or_mask: Tensor,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    *,
    size: Sequence[int] | None = None,
) -> Windows:
    """The windows that hold tokens.

    Args:
        coords_or_mask: (T, 1 + n) integers, the image and n >= 1 spatial coordinates, slowest first (y, x or z, y, x);
            or (B, H, W, ...) bool, whose True places are the tokens in row order.
        window: sides of the windows, one or n.
        shift: by which the windows are shifted, one or n, from 0 to window - 1.
        size: n sizes of the map that coordinates must lie in; a mask has its own.

    Returns:
        Windows in order of image and place, and within each one the tokens in row order.

    Raises:
        ValueError: a shape does not fit, a shift is not below its window, or a coordinate is out of range.
        TypeError: neither integers nor bool.
    """
    coords, window, shift = _coordinates(coords_or_mask, window, shift, size)
    cell, place = _cells(coords, window, shift)
    volume = 1
    for side in window:
        volume *= side
    order = torch.argsort(cell * volume + place, stable=True)
    counts = torch.unique_consecutive(cell[order], return_counts=True)[1]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return Windows(offsets, order, order, place[order], int(counts.max()) if len(counts) else 0)


def rotated_sets(
    coords_or_mask: Tensor,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    *,
    set_size: int,
    size: Sequence[int] | None = None,
) -> Sets:
    """DSVT's partition: sets of equal size within windows, once ordered along y and once along x.

    Args:
        coords_or_mask, window, shift, size: as in `build_windows`, with n >= 2. DSVT adds its shift to coordinates:
            its shift s is (window - s) % window here.
        set_size: slots S of a set.

    Raises:
        ValueError: as `build_windows`; one spatial axis alone; set_size below 1.
    """
    coords, window, shift = _coordinates(coords_or_mask, window, shift, size)
    if len(window) < 2 or set_size < 1:
        raise ValueError(f'sets need two spatial axes and a positive set_size, got {len(window)} and {set_size=}')
    cell, _ = _cells(coords, window, shift, last_first=True)
    inner = [(coords[:, axis + 1] - s) % w for axis, (w, s) in enumerate(zip(window, shift))]
    # y, x, then the slower axes, and x, y, then those
    orders = ([-2, -1, *range(len(window) - 2)], [-1, -2, *range(len(window) - 2)])
    counts = torch.unique(cell, return_counts=True)[1]  # windows in order of their number
    sets = (counts + set_size - 1) // set_size
    total = int(sets.sum())
    owner = torch.repeat_interleave(sets, output_size=total)
    rank = torch.arange(total, device=coords.device) - (sets.cumsum(0) - sets)[owner]
    slot = rank[:, None] * set_size + torch.arange(set_size, device=coords.device)
    within = slot * counts[owner][:, None] // (sets[owner][:, None] * set_size)
    position = (counts.cumsum(0) - counts)[owner][:, None] + within
    index = []
    for axes in orders:
        key = cell
        for axis in axes:
            key = key * window[axis] + inner[axis]
        index.append(torch.argsort(key, stable=True)[position] if total else position)
    both = torch.stack(index)
    repeated = torch.zeros_like(both, dtype=torch.bool)
    repeated[..., 1:] = both[..., 1:] == both[..., :-1]
    return Sets(both, repeated)


def _cells(
    coords: Tensor, window: Sequence[int], shift: Sequence[int], last_first: bool = False
) -> tuple[Tensor, Tensor]:
    """The number of each token's window and its place there; windows are numbered with the last axis as the slowest
    one if `last_first`."""
    cell = coords[:, 0]
    place = torch.zeros_like(cell)
    axes = list(range(len(window)))
    for axis in axes:
        place = place * window[axis] + (coords[:, axis + 1] - shift[axis]) % window[axis]
    for axis in reversed(axes) if last_first else axes:
        number = torch.div(coords[:, axis + 1] - shift[axis], window[axis], rounding_mode='floor') + 1
        cell = cell * (number.max() + 1 if number.numel() else 1) + number
    return cell, place


def _coordinates(
    given: Tensor, window: int | Sequence[int], shift: int | Sequence[int], size: Sequence[int] | None
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    if given.dtype == torch.bool:
        if given.ndim < 2:
            raise ValueError(f'a mask must be (B, H, W), got {tuple(given.shape)=}')
        axes, coords = given.ndim - 1, given.nonzero()
    elif given.is_floating_point() or given.is_complex():
        raise TypeError(f'coords must be integers, or a mask of bool, got {given.dtype}')
    else:
        if given.ndim != 2 or given.shape[1] < 2:
            raise ValueError(f'coords must be (T, 1 + n), the image and n coordinates, got {tuple(given.shape)=}')
        axes, coords = given.shape[1] - 1, given.long()
    window = (window,) * axes if isinstance(window, int) else tuple(window)
    shift = (shift,) * axes if isinstance(shift, int) else tuple(shift)
    if len(window) != axes or len(shift) != axes:
        raise ValueError(f'window and shift must have one number per axis, {axes}, got {window=}, {shift=}')
    if any(w < 1 or not 0 <= s < w for w, s in zip(window, shift)):
        raise ValueError(f'window must be positive and shift from 0 to window - 1, got {window=}, {shift=}')
    if coords.numel() and given.dtype != torch.bool:
        low, high = coords.amin(0).tolist(), coords.amax(0).tolist()
        if min(low) < 0:
            raise ValueError(f'coords must not be negative, got {low} as the smallest of each column')
        if size is not None and any(h >= s for h, s in zip(high[1:], size, strict=True)):
            raise ValueError(f'coords must lie in the map, size={tuple(size)}, got {high[1:]} as the largest ones')
    return coords, window, shift
