"""Names that callers pass: finding what they mean, or saying what they could have meant."""
import os
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import TypeVar

_T = TypeVar('_T')


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the most similar known name, preferring a longer common beginning; '' if none is near."""
    lower = name.lower()
    best = max(((SequenceMatcher(None, lower, other.lower()).ratio(), len(os.path.commonprefix([lower, other.lower()])), other)
                for other in known), key=lambda found: found[:2], default=(0.0, 0, ''))
    return f'; did you mean {best[2]}?' if best[0] >= 0.6 else ''


def choose(kind: str, name: str, table: Mapping[str, _T]) -> _T:
    """table[name].

    Raises:
        ValueError: there is no such name; the message lists them.
    """
    if name not in table:
        raise ValueError(f'{kind} must be one of {", ".join(sorted(table))}, got {name!r}{nearest(str(name), table)}')
    return table[name]
