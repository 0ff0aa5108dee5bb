"""Interleaved timing of a pair: both sides run in turn, the minimum counts, so that noise hits them alike."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """One line of a benchmark: seconds per call of both sides; ratio > 1 means that ours is faster."""

    name: str
    ours: float
    peer: float
    peer_name: str
    ours_bytes: int | None = None  # peak of tensors, where it is measured
    peer_bytes: int | None = None
    shared: float | None = None  # seconds of what both sides have in common, where it is measured
    device: str | None = None
    floor_bytes: int | None = None  # of a forward pass: counted, not measured
    floor_operations: int | None = None
    bandwidth_share: float | None = None  # floor_bytes per our second, over the measured bandwidth of a copy

    @property
    def ratio(self) -> float:
        return self.peer / self.ours

    def row(self) -> dict[str, Any]:
        return {**asdict(self), 'ratio': self.ratio}


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    peer_name: str,
    repeats: int = 10,
    warmup: int = 2,
) -> Comparison:
    """Time two callables in turn.

    Args:
        name: what is measured.
        ours, peer: called without arguments; a call's seconds are its wall time.
        peer_name: what it is compared with.
        repeats: calls of each side; the minimum is taken.
        warmup: calls of each side before that.
    """
    for _ in range(warmup):
        ours()
        peer()
    best = [float('inf'), float('inf')]
    for repeat in range(repeats):
        # Who goes first alternates: the second side finds warmer caches.
        for side in ((0, 1), (1, 0))[repeat % 2]:
            start = time.perf_counter()
            (ours, peer)[side]()
            best[side] = min(best[side], time.perf_counter() - start)
    return Comparison(name=name, ours=best[0], peer=best[1], peer_name=peer_name)
