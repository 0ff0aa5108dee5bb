"""A progress bar for whatever indexes or builds: rich's where it is installed and a person is watching."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

try:
    from rich.progress import track as _rich_track
except ImportError:  # rich comes with the extra `train`
    _rich_track = None  # type: ignore[assignment]

Item = TypeVar('Item')
_WORTH_A_BAR = 200


def track(items: Iterable[Item], text: str, total: int | None = None) -> Iterator[Item]:
    """Iterates over `items`; a bar that disappears when done is shown on a terminal, and nothing anywhere else."""
    if total is None and hasattr(items, '__len__'):
        total = len(items)  # type: ignore[arg-type]
    few = total is not None and total < _WORTH_A_BAR
    if _rich_track is None or few or not sys.stdout.isatty():
        yield from items
    else:
        yield from _rich_track(items, description=text, total=total, transient=True)
