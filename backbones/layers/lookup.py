"""Names that callers pass: finding what they mean, or saying what they could have meant."""

from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import TypeVar

_T = TypeVar('_T')


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the most similar known name, or '' if none is near."""
    wanted = name.lower()

    def likeness(other: str) -> tuple[float, int]:
        other = other.lower()
        beginning = next((i for i, (a, b) in enumerate(zip(wanted, other)) if a != b), min(len(wanted), len(other)))
        return SequenceMatcher(None, wanted, other).ratio(), beginning

    best = max(known, key=likeness, default='')
    return f'; did you mean {best}?' if best and likeness(best)[0] >= 0.6 else ''


def choose(kind: str, name: str, table: Mapping[str, _T]) -> _T:
    """table[name].

    Raises:
        ValueError: there is no such name; the message lists them.
    """
    if name not in table:
        raise ValueError(f'{kind} must be one of {", ".join(sorted(table))}, got {name!r}{nearest(str(name), table)}')
    return table[name]
