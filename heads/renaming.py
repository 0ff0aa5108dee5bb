"""Keys of published checkpoints under our names."""

import re
from collections.abc import Iterable


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """The key after all rules (pattern, replacement) of `re.sub`, one after the other."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
