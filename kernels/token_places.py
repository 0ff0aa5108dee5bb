"""Tokens that move: sums of rows that go to the same place, and rows taken back from there.

    sum_to_places:  out[b, p] = sum over n with place[b, n] = p of x[b, n]        merging; mean_to_places with shares
    take_places:    out[b, n] = x[b, place[b, n]]                                 undoing it

The first two are one operation on whole rows of the flattened batch: on a CPU five to fifteen times faster than
`scatter_add` and `gather` with an index per element, and copies of rows on a GPU. The gradient of each is the other.
"""

# B batch, N rows before, M after, C channels
import torch
from torch import Tensor

from .dispatch import refuse_triton, select

WIDEST = 8192  # channels of a row that one program of the Triton kernel holds


def sum_to_places(x: Tensor, place: Tensor, left: int) -> Tensor:
    """(B, N, C) -> (B, left, C); places that nothing goes to are zero.

    Args:
        x: (B, N, C).
        place: (B, N) int64 from 0 to left - 1.

    Raises:
        ValueError: the shapes do not fit.
    """
    B, C = _check(x, place, same=True)
    if torch.compiler.is_exporting():  # TensorRT takes no scattering that adds
        goes = place[:, None] == torch.arange(left, device=x.device)[:, None]
        return goes.to(x.dtype) @ x
    out = torch.zeros(B * left, C, dtype=x.dtype, device=x.device)
    return out.index_add(0, _flat(place, left), x.reshape(-1, C)).view(B, left, C)


def mean_to_places(
    x: Tensor, share: Tensor, place: Tensor, kept: Tensor, moved: Tensor, *, backend: str | None = None
) -> Tensor:
    """(B, N, C) -> (B, M, C): sum_to_places(x * share, place, M) where the shares of each place sum to 1.

    The row that stays at a place has what the others leave of 1, so that only the moved rows need arithmetic: all
    others are copied once.

    Args:
        x: (B, N, C).
        share: (B, N, 1).
        place: (B, N) int64, where each row goes.
        kept: (B, M) int64, the row that stays at each place.
        moved: (B, N - M) int64, all other rows.
        backend: None chooses; 'torch' or 'triton' insists.

    Raises:
        ValueError: the shapes do not fit, or the backend asked for cannot take the call.
    """
    _check(x, place, same=True)
    if select('mean_to_places', backend, {'triton': can_run_triton(x, share), 'torch': None}) == 'triton':
        from .triton_merge import mean_to_places_triton  # Triton is imported where it is used

        return mean_to_places_triton(x, share, place, kept, moved)
    return mean_to_places_reference(x, share, place, kept, moved)


def mean_to_places_reference(x: Tensor, share: Tensor, place: Tensor, kept: Tensor, moved: Tensor) -> Tensor:
    """The definition in plain PyTorch."""
    (B, _, C), left = x.shape, kept.shape[1]
    if torch.compiler.is_exporting():
        return sum_to_places(x * share, place, left)
    rows = x.reshape(-1, C)
    out = rows.index_select(0, _flat(kept, x.shape[1]))
    target = _flat(place.gather(1, moved), left)
    change = rows.index_select(0, _flat(moved, x.shape[1])) - out.index_select(0, target)
    weight = share.gather(1, moved[..., None]).reshape(-1, 1).to(x.dtype)
    return out.index_add_(0, target, change * weight).view(B, left, C)


def take_places(x: Tensor, place: Tensor) -> Tensor:
    """(B, M, C) -> (B, N, C).

    Args:
        x: (B, M, C).
        place: (B, N) int64 from 0 to M - 1.

    Raises:
        ValueError: the shapes do not fit.
    """
    B, C = _check(x, place, same=False)
    return x.reshape(-1, C).index_select(0, _flat(place, x.shape[1])).view(B, -1, C)


def falling(values: Tensor) -> Tensor:
    """(B, N) -> (B, N) int64, the positions of each row's values from the largest to the smallest; of equal ones the
    first comes first. In exported graphs it is TopK, as ONNX has no sort."""
    if torch.compiler.is_exporting():
        return values.topk(values.shape[1], dim=1).indices
    return values.argsort(dim=1, descending=True, stable=True)


def rising(positions: Tensor) -> Tensor:
    """(B, N) int64 below 2 ** 24 -> the same in rising order."""
    if torch.compiler.is_exporting():
        return positions.float().neg().topk(positions.shape[1], dim=1).values.neg().long()
    return positions.sort(1).values


def can_run_triton(x: Tensor, share: Tensor) -> str | None:
    """Why Triton cannot take this call."""
    if x.shape[2] > WIDEST:
        return f'rows are {x.shape[2]} channels wide, and the kernel takes up to {WIDEST}'
    return refuse_triton({'x': x, 'share': share})


def _flat(place: Tensor, left: int) -> Tensor:
    first = torch.arange(place.shape[0], device=place.device)[:, None] * left
    return (place + first).flatten()


def _check(x: Tensor, place: Tensor, same: bool) -> tuple[int, int]:
    if x.ndim != 3 or place.ndim != 2 or x.shape[0] != place.shape[0] or (same and x.shape[1] != place.shape[1]):
        raise ValueError(f'x must be (B, N, C) and place (B, N), got {tuple(x.shape)=}, {tuple(place.shape)=}')
    return x.shape[0], x.shape[2]
