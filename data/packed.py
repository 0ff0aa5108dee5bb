"""A list of small Python objects kept as one byte array, so that forked workers share its pages."""

import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np


class PackedList:
    """Read-only list. A plain list of a million polygons is copied into each worker page by page, because reading an
    object writes its reference count; a byte array is not. An item is unpickled (from our own memory) when asked for.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        chunks: list[bytes] = [pickle.dumps(item, protocol=5) for item in items]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        self._bytes = np.frombuffer(b''.join(chunks), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(self._bytes[start : int(self._ends[index])].data)
