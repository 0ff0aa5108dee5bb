"""Which implementation of a tensor operation runs: the caller's wish, a `use(...)` block, or the first one that can.

Every operation has a PyTorch reference called 'torch', which takes every call. Faster implementations come before it
and say, call by call, why they cannot run; that sentence is what a caller who insists on one gets to read.
"""

from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ('triton', 'torch')

_forced: str | None = None


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Within the block every operation runs on `backend` ('torch' or 'triton'); None restores the free choice.

    Exporters use `use('torch')`: the reference is plain PyTorch, so no exported graph needs a plugin.

    Raises:
        ValueError: `backend` is not a known one.
    """
    global _forced
    if backend is not None:
        _check_name(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def select(operation: str, backend: str | None, refusals: dict[str, str | None]) -> str:
    """The backend to run a call on.

    Args:
        operation: name for messages.
        backend: what the caller asked for, or None.
        refusals: for each backend, best first, why it cannot take this call (None: it can).

    Raises:
        ValueError: the backend asked for is unknown or cannot take this call.
    """
    wanted = backend if backend is not None else _forced
    if wanted is None:
        return next(name for name, reason in refusals.items() if reason is None)
    _check_name(wanted)
    reason = refusals.get(wanted, 'it has no such implementation')
    if reason is not None:
        raise ValueError(f"{operation} cannot run with backend='{wanted}': {reason}; use backend='torch'")
    return wanted


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {", ".join(BACKENDS)}, got {backend=}')
