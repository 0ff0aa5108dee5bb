"""Attention within windows that hold different numbers of tokens; windows without tokens cost nothing.

For an entry i of window w, with q, k, v the rows of its tokens and j the entries of w:

    out[i] = sum over j of softmax_j(scale * q[i] . k[j] + bias[place[i], place[j]]) * v[j]          (per head)

Window w has the entries from offsets[w] to below offsets[w + 1]. Entry e is token index[e], or token e itself; a token
may be an entry of several windows, and one of its entries gives its result. Queries whose window has no keys, and
tokens without an entry, give zeros. Layout: q, k, v (T, h, d); out (T, h, d).
Source: DSVT, arXiv 2301.06051, for sets within windows; `windows.py` makes offsets and indices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import refuse_triton, select
from .windows import Windows


def sparse_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | Windows,
    *,
    key_offsets: Tensor | None = None,
    bias: Tensor | None = None,
    places: Tensor | None = None,
    scale: float | None = None,
    longest: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within windows of tokens.

    Args:
        q: (T, h, d) floating point.
        k, v: (S, h, d); S = T unless `key_offsets` is given.
        offsets: the `Windows` of `build_windows` or `rotated_sets`, for tokens in any order; or (W + 1,) integers from
            0 to T that do not decrease, for tokens ordered by window.
        key_offsets: (W + 1,) integers from 0 to S, for keys that are not the queries' own tokens.
        bias: (h, N, N), added to the scaled products by the places of both tokens.
        places: (T,) the place of each token in its window, from 0 to N - 1; `Windows` bring their own.
        scale: of the products; d ** -0.5 if None.
        longest: entries of the largest window, of queries or of keys, where it is known: with it (`Windows` bring their
            own) the call compiles into one graph, and offsets are taken as they are, unchecked.
        backend: None chooses; 'torch' or 'triton' insist.

    Returns:
        (T, h, d) of the type of q.

    Raises:
        ValueError: a shape, device or type does not fit, offsets or places are out of range, or the backend cannot
            take the call.
    """
    if isinstance(offsets, Windows):
        if key_offsets is not None or places is not None:
            raise ValueError(
                'Windows bring their own places and keys; pass offsets (W + 1,) with key_offsets or places'
            )
        windows = offsets
        if windows.index.device != q.device:
            raise ValueError(f'windows must be where q is, on {q.device}, got {windows.index.device}')
    else:
        if longest is None:
            _check_offsets('offsets', offsets, q)
            longest = _longest(offsets)
            if key_offsets is not None:
                _check_offsets('key_offsets', key_offsets, k)
                longest = max(longest, _longest(key_offsets))
        windows = Windows(offsets, offsets, offsets, places, longest)
    _check(q, k, v, key_offsets, windows, bias)
    if bias is not None and windows is not offsets:
        _check_places(windows.places, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    refusals = {'triton': can_run_triton(q, k, v, bias), 'torch': None}
    compute = sparse_window_attention_reference
    if select('sparse_window_attention', backend, refusals) == 'triton':
        compute = _triton
    places = windows.places if bias is not None else None
    index, write = (windows.index, windows.write) if windows is offsets else (None, None)  # else in order
    return compute(q, k, v, windows.offsets, key_offsets, index, write, bias, places, windows.longest, scale)


def sparse_window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    index: Tensor | None,
    write: Tensor | None,
    bias: Tensor | None,
    places: Tensor | None,
    longest: int,
    scale: float,
) -> Tensor:
    """Windows of similar length together: each group is padded to the longest of its windows and masked."""
    T = q.shape[0]
    target = torch.arange(T, device=q.device) if write is None else torch.where(write < 0, T, write)
    keys_at = offsets if key_offsets is None else key_offsets
    # zeros that have a gradient; the last row takes what nobody asked for
    out = F.pad(q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0), (0, 0, 0, 0, 0, 1))
    for these, length_q, length_k in _groups(offsets, keys_at, longest):
        entry, exists = _padded(offsets, these, length_q)
        key_entry, key_exists = _padded(keys_at, these, length_k)
        row, key_row = (entry, key_entry) if index is None else (index[entry], index[key_entry])
        mask = torch.zeros_like(key_exists, dtype=q.dtype).masked_fill(~key_exists, torch.finfo(q.dtype).min)
        mask = mask[:, None, None, :].expand(-1, q.shape[1], length_q, -1)
        if bias is not None and places is not None:
            mask = mask + bias.to(q.dtype)[:, places[entry][:, :, None], places[key_entry][:, None, :]].transpose(0, 1)
        query, key, value = (t[r].transpose(1, 2) for t, r in ((q, row), (k, key_row), (v, key_row)))
        found = F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)
        found = found * key_exists.any(1)[:, None, None, None]
        out = out.index_put((torch.where(exists, target[entry], T),), found)
    return out[:T]


def can_run_triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why Triton cannot take this call."""
    return refuse_triton({'q': q, 'k': k, 'v': v, 'bias': bias}, width=q.shape[-1])


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_offsets: Tensor | None,
    index: Tensor | None,
    write: Tensor | None,
    bias: Tensor | None,
    places: Tensor | None,
    longest: int,
    scale: float,
) -> Tensor:
    from .triton_ragged import ragged_attention  # Triton is imported where it is used

    keys_at = offsets if key_offsets is None else key_offsets
    return ragged_attention(
        q[None],
        k[None],
        v[None],
        offsets,
        keys_at,
        longest=(longest, longest),
        scale=scale,
        bias=bias,
        places=(places, places),
        index=(index, index),
        write=write,
    )[0]


def _groups(offsets: Tensor, key_offsets: Tensor, longest: int) -> list[tuple[Tensor, int, int]]:
    """Windows of similar length, and the most queries and keys of one; in a compiled graph all windows together."""
    if not longest:
        return []
    if torch.compiler.is_compiling():
        return [(torch.arange(offsets.shape[0] - 1, device=offsets.device), longest, longest)]
    lengths = torch.stack((offsets.diff(), key_offsets.diff()))
    by_size: dict[int, list[int]] = {}
    for number, (queries, keys) in enumerate(lengths.T.tolist()):
        if queries and keys:
            by_size.setdefault((max(queries, keys) - 1).bit_length(), []).append(number)
    found = []
    for numbers in by_size.values():
        these = torch.tensor(numbers, device=offsets.device)
        found.append((these, *lengths[:, these].amax(1).tolist()))
    return found


def _padded(offsets: Tensor, windows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(windows, length) entries of windows, and which exist; the others stand for entry 0."""
    entry = offsets[windows][:, None] + torch.arange(length, device=offsets.device)
    exists = entry < offsets[windows + 1][:, None]
    return torch.where(exists, entry, 0), exists


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max()) if offsets.numel() > 1 else 0


def _check_offsets(name: str, offsets: Tensor, rows: Tensor) -> None:
    if offsets.ndim != 1 or offsets.numel() < 1 or offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise ValueError(f'{name} must be (W + 1,) integers, got {offsets.dtype}, {tuple(offsets.shape)}')
    if offsets.device != rows.device:
        raise ValueError(f'{name} must be where q is, on {rows.device}, got {offsets.device}')
    first, last, least = int(offsets[0]), int(offsets[-1]), int(offsets.diff().min()) if offsets.numel() > 1 else 0
    if first != 0 or last != rows.shape[0] or least < 0:
        raise ValueError(
            f'{name} must go from 0 to {rows.shape[0]}, the number of tokens, and not decrease; '
            f'got {first} to {last}, smallest step {least}'
        )


def _check(q: Tensor, k: Tensor, v: Tensor, key_offsets: Tensor | None, windows: Windows, bias: Tensor | None) -> None:
    if any(t.ndim != 3 for t in (q, k, v)) or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f'q must be (T, h, d), k and v (S, h, d), got {tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}'
        )
    if any(t.dtype != q.dtype or t.device != q.device for t in (k, v)):
        raise ValueError(
            'q, k and v must be of one type on one device, got '
            f'{q.dtype} on {q.device}, {k.dtype} on {k.device}, {v.dtype} on {v.device}'
        )
    if key_offsets is None:
        if q.shape != k.shape:
            raise ValueError(f'other keys need key_offsets, got {tuple(q.shape)=}, {tuple(k.shape)=}')
    else:
        if key_offsets.shape != windows.offsets.shape:
            raise ValueError(
                f'key_offsets must have one number per window, as offsets {tuple(windows.offsets.shape)}, '
                f'got {tuple(key_offsets.shape)}'
            )
    if bias is None:
        return
    if bias.ndim != 3 or bias.shape[0] != q.shape[1] or bias.shape[1] != bias.shape[2] or bias.device != q.device:
        raise ValueError(f'bias must be (h, N, N), h = {q.shape[1]}, on {q.device}, got {tuple(bias.shape)=}')
    if windows.places is None or key_offsets is not None:
        raise ValueError('bias needs the places of tokens within their windows, and keys that are the same tokens')


def _check_places(places: Tensor | None, bias: Tensor) -> None:
    assert places is not None
    if torch.compiler.is_compiling():
        return
    if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < bias.shape[1]):
        raise ValueError(
            f'places must be from 0 to {bias.shape[1] - 1}, got {int(places.min())} to {int(places.max())}'
        )
