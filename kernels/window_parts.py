"""Window attention on a CPU without gradients, part by part: the values of the definition with fewer copies.

Shifted windows that neither wrap around nor hold padding lie on the map like unshifted ones. They are one part: read
from the map with one copy, attended to with one bias for all of them, written to the result with one copy. Only the
windows at the border are put together from pieces, and only they need a mask; each row and each column of them is a
part of its own, so that one mask serves all of its windows. So the map is neither padded nor rolled, and no mask per
window exists. Large parts are done some windows at a time, in one buffer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_BUFFER = 2**20  # elements of the buffer that windows are copied to


@dataclass(frozen=True)
class Run:
    """Consecutive windows along one axis: either one window or any number of them that lie inside the map.

    Args:
        windows: how many.
        pieces: (first position within the run, first one on the map, how many); positions in no piece are padding.
        labels: of the positions of each window; positions with different labels do not see each other.
        length: positions of the run.
    """

    windows: int
    pieces: tuple[tuple[int, int, int], ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.windows * len(self.labels)

    @property
    def filled(self) -> bool:
        """Whether no position is padding."""
        return sum(count for _, _, count in self.pieces) == self.length

    @property
    def whole(self) -> bool:
        """Whether the run is one stretch of the map."""
        return self.filled and len(self.pieces) == 1


def runs(size: int, window: int, shift: int, before: int, dilation: int, mask_padding: bool) -> list[Run]:
    """The windows of one axis: those between its borders together, the others one by one."""
    span, step = window * dilation, shift * dilation
    total = (size + before + span - 1) // span * span

    def stretch(low: int, high: int, offset: int) -> tuple[int, int, int]:
        """Of the shifted positions from low to high, which hold position + offset of the map, those inside it."""
        start, end = max(low, -offset), min(high, size - offset)
        return start, start + offset, max(end - start, 0)

    stretches = stretch(0, total - step, step - before), stretch(total - step, total, step - total - before)
    first = (stretches[0][0] + span - 1) // span
    last = max((stretches[0][0] + stretches[0][2]) // span, first)
    single = [(n, n + 1) for n in (*range(first), *range(last, total // span))]
    found = []
    for start, end in [(first, last), *single] if last > first else single:
        low, high = start * span, end * span
        pieces = []
        for place, source, count in stretches:
            begin, stop = max(place, low), min(place + count, high)
            if stop > begin:
                pieces.append((begin - low, source + begin - place, stop - begin))
        labels = [int(low + n >= total - step) for n in range(span)]
        if mask_padding and end == start + 1:
            inside = {place + n for place, _, count in pieces for n in range(count)}
            labels = [label if n in inside else -1 for n, label in enumerate(labels)]
        found.append(Run(end - start, tuple(pieces), tuple(labels)))
    return found


def window_attention_in_parts(
    qkv: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    heads: int,
    bias: Tensor | None,
    scale: float,
    outside: Tensor | None,
    pad: tuple[int, int],
    dilation: int,
    cosine: Tensor | None = None,
) -> Tensor:
    """See `window_attention`."""
    B, H, W, C3 = qkv.shape
    out = qkv.new_empty(B, H, W, C3 // 3)
    bias = None if bias is None else bias.to(qkv.dtype)[None]
    vertical, horizontal = (
        runs(size, w, s, before, dilation, outside is None)
        for size, w, s, before in zip((H, W), window, shift, pad, strict=True)
    )
    for rows in vertical:
        for cols in horizontal:
            attend = partial(
                _attend,
                window=window,
                d=dilation,
                heads=heads,
                mask=_mask(rows, cols, window, dilation, bias, qkv),
                scale=scale,
                outside=outside,
                cosine=None if cosine is None else cosine.to(qkv.dtype)[:, None, None],
            )
            if dilation == 1 or (rows.whole and cols.whole):
                attend(qkv, out, rows, cols)
            else:  # pieces may begin between the steps of a dilation: put together a small map of whole windows first
                _attend_aside(attend, qkv, out, rows, cols, outside)
    return out


def _attend(
    source: Tensor,
    target: Tensor,
    rows: Run,
    cols: Run,
    *,
    window: tuple[int, int],
    d: int,
    heads: int,
    mask: Tensor | None,
    scale: float,
    outside: Tensor | None,
    cosine: Tensor | None,
) -> None:
    """Attends within the windows of one part of `source` (B, H, W, 3C) and writes to their places in `target`."""
    (wh, ww), (B, _, _, C3) = window, source.shape
    row_size = d * cols.windows * d * wh * ww * C3
    rows_at_once = min(max(_BUFFER // row_size, 1), rows.windows)
    images_at_once = min(max(_BUFFER // (row_size * rows.windows), 1), B)
    buffer = source.new_empty(images_at_once, rows_at_once, d, cols.windows, d, wh, ww, C3)
    for image in range(0, B, images_at_once):
        images = slice(image, image + images_at_once)
        for row in range(0, rows.windows, rows_at_once):
            count = min(rows_at_once, rows.windows - row)
            windows = buffer[: min(images_at_once, B - image), :count]
            if not (rows.filled and cols.filled):
                _fill(windows, outside)
            pieces = list(_pieces(rows, cols, row, count, d))
            for there, sizes, here in pieces:
                _as_map(windows)[here] = source[images][there].unflatten(2, sizes[1]).unflatten(1, sizes[0])
            query, key, value = windows.view(-1, wh * ww, 3, heads, C3 // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
            if cosine is not None:
                query, key, scale = F.normalize(query, dim=-1) * cosine, F.normalize(key, dim=-1), 1.0
            each_mask = mask
            if mask is not None and mask.ndim > 4:  # (d, d, heads, N, N): one for each phase of the dilation
                phases = mask[:, None].expand(*windows.shape[:5], *mask.shape[2:])
                each_mask = phases.flatten(0, 4)
            result = F.scaled_dot_product_attention(query, key, value, each_mask, scale=scale)
            result = result.transpose(1, 2).reshape(*windows.shape[:-1], C3 // 3)
            for there, sizes, here in pieces:
                target[images][there].unflatten(2, sizes[1]).unflatten(1, sizes[0]).copy_(_as_map(result)[here])


def _pieces(
    rows: Run, cols: Run, row: int, count: int, d: int
) -> Iterator[tuple[tuple[slice, ...], tuple[tuple[int, int, int], tuple[int, int, int]], tuple[slice, ...]]]:
    """Where the pieces of `count` rows of windows lie on the map, how that is cut, and where they lie in the windows.

    The first indexes (B, H, W, C), whose H and W are cut into (windows, places in a window, phases of the dilation);
    the last indexes what `_as_map` gives.
    """
    every = slice(None)
    for i, top, height in rows.pieces:
        down = height // (rows.windows * d)  # places in each window
        start = top + row * len(rows.labels)
        for j, left, width in cols.pieces:
            right = width // (cols.windows * d)
            yield (
                (every, slice(start, start + count * down * d), slice(left, left + width)),
                ((count, down, d), (cols.windows, right, d)),
                (every, every, slice(i // d, i // d + down), every, every, slice(j // d, j // d + right)),
            )


def _as_map(windows: Tensor) -> Tensor:
    """(B, rows, d, cols, d, wh, ww, C) in the order of the map: (B, rows, wh, d, cols, ww, d, C)."""
    return windows.permute(0, 1, 5, 2, 3, 6, 4, 7)


def _attend_aside(
    attend: Callable[[Tensor, Tensor, Run, Run], None],
    source: Tensor,
    target: Tensor,
    rows: Run,
    cols: Run,
    outside: Tensor | None,
) -> None:
    """The same on a map of this part alone."""
    part = source.new_empty(source.shape[0], rows.length, cols.length, source.shape[-1])
    result = target.new_empty(*part.shape[:3], target.shape[-1])
    _fill(part, outside)
    places = [
        (
            (slice(None), slice(i, i + height), slice(j, j + width)),
            (slice(None), slice(top, top + height), slice(left, left + width)),
        )
        for i, top, height in rows.pieces
        for j, left, width in cols.pieces
    ]
    for here, there in places:
        part[here] = source[there]
    attend(part, result, *(replace(run, pieces=((0, 0, run.length),)) for run in (rows, cols)))
    for here, there in places:
        target[there] = result[here]


def _fill(x: Tensor, outside: Tensor | None) -> None:
    """What padding holds; zeros where nothing sees it, for what lay in memory might not be a number."""
    if outside is None:
        x.zero_()
    else:
        x.copy_(outside)


def _mask(rows: Run, cols: Run, window: tuple[int, int], d: int, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scaled products of the windows of a part: (1, heads, N, N), or one for each phase."""
    if len({*rows.labels}) == 1 and len({*cols.labels}) == 1 and -1 not in (rows.labels[0], cols.labels[0]):
        return bias
    vertical, horizontal = (torch.tensor(run.labels, device=like.device) for run in (rows, cols))
    label = vertical[:, None] * 2 + horizontal
    label = torch.where((vertical[:, None] >= 0) & (horizontal >= 0), label, -1)
    label = label.reshape(window[0], d, window[1], d).permute(1, 3, 0, 2).flatten(2)
    if -1 not in (*rows.labels, *cols.labels):
        label = label[:1, :1]  # shifts are whole steps of the dilation: all phases are cut alike
    allowed = (label[..., None, :] == label[..., :, None])[:, :, None]
    mask = torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, float('-inf'))
    mask = mask if bias is None else mask + bias
    return mask[0] if mask.shape[:2] == (1, 1) else mask
