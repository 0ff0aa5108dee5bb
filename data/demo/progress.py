"""A progress bar for builders: rich's where it is installed and somebody watches, else a line at the start and end."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar('T')


def track(items: Iterable[T], *, total: int, title: str) -> Iterator[T]:
    """Yield `items` while showing how far they are on stderr.

    Args:
        items: what to go through.
        total: how many there are.
        title: what is being done, a few words.
    """
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track as rich_track
        except ImportError:
            yield from _plain_bar(items, total, title)
        else:
            yield from rich_track(items, total=total, description=title, console=Console(stderr=True), transient=True)
        return
    start = time.monotonic()
    print(f'{title}: {total} ...', file=sys.stderr, flush=True)
    yield from items
    print(f'{title}: {total} in {time.monotonic() - start:.1f} s', file=sys.stderr, flush=True)


def _plain_bar(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    width, last = 30, -1
    for count, item in enumerate(items):
        if (filled := width * count // max(total, 1)) != last:
            bar = '#' * filled + '.' * (width - filled)
            print(f'\r{title} [{bar}] {count}/{total}', end='', file=sys.stderr, flush=True)
            last = filled
        yield item
    print(f'\r{title} [{"#" * width}] {total}/{total}', file=sys.stderr, flush=True)
