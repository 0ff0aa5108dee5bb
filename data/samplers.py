"""Samplers that can start anywhere: what they yield is a function of the seed and the number of the draw alone."""

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import Sampler

_EDGES = (1.0,)


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class RestartableSampler(Sampler):
    """Endless (index, draw) for training. Draw d, counted over all ranks, is element d % n of a permutation of the
    dataset that depends on (seed, d // n); rank r of W gets the draws r, r + W, r + 2 W, ...

    Args:
        dataset: anything with a length.
        shuffle: False repeats 0, 1, ..., n - 1.
        seed: the same on every rank. None counts as 0.
        batch_size: per rank; with it each pass is cut to whole batches, so that no batch holds an image twice.
    """

    def __init__(
        self, dataset: Sized, *, shuffle: bool = True, seed: int | None = 0, batch_size: int | None = None
    ) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, int(seed or 0)
        self.rank, self.world_size = _rank_and_world()
        whole = (batch_size or 1) * self.world_size
        self._per_pass = len(dataset) // whole * whole if batch_size else len(dataset)
        if self._per_pass == 0:
            raise ValueError(
                f'dataset must hold a batch for every rank, got {len(dataset)} images for {batch_size=} '
                f'on {self.world_size} ranks'
            )
        self._start = 0

    def start_at(self, draw: int) -> None:
        """The next iteration begins at this draw, counted over all ranks: iteration * batch_size * world_size."""
        if draw < 0 or draw % self.world_size:
            raise ValueError(f'draw must be a multiple of the {self.world_size} ranks, got {draw=}')
        self._start = draw

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw, current, order = self._start + self.rank, -1, np.zeros(0, dtype=np.int64)
        while True:
            turn, place = divmod(draw, self._per_pass)
            if turn != current:
                current, order = turn, self._order(turn)
            yield int(order[place]), draw
            draw += self.world_size

    def _order(self, turn: int) -> np.ndarray:
        count = len(self.dataset)
        if not self.shuffle:
            return np.arange(count)
        return np.random.Generator(np.random.PCG64([self.seed, turn])).permutation(count)

    def __len__(self) -> int:
        """Draws of this rank in one pass over the dataset, though the sampler itself does not end."""
        return -(-self._per_pass // self.world_size)


class EvalSampler(Sampler):
    """Each index once, in order: rank r of W gets r, r + W, ... Where n is not a multiple of W the last ranks repeat
    an index from the beginning, so that all have equally many; mmengine's evaluator cuts those off.

    Args:
        dataset: anything with a length.
        seed: unused, accepted because mmengine passes it to every sampler.
        shuffle: must be False.
    """

    def __init__(self, dataset: Sized, *, seed: int | None = None, shuffle: bool = False) -> None:
        if shuffle:
            raise ValueError('EvalSampler goes in order, got shuffle=True; use RestartableSampler')
        self.dataset = dataset
        self.rank, self.world_size = _rank_and_world()
        self._start = 0

    def start_at(self, draw: int) -> None:
        """The next iteration begins at this index, counted over all ranks."""
        self._start = draw

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        total = -(-count // self.world_size) * self.world_size
        for draw in range(self._start + self.rank, total, self.world_size):
            yield draw % count

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world_size)


class AspectRatioBatchSampler(Sampler):
    """Batches whose pictures all fall into one bin of height / width, so that padding is small.

    Pictures wait in the queue of their bin; a queue with batch_size of them is a batch. Over an endless sampler nothing
    is lost; over one that ends, the remaining queues are yielded as smaller batches.

    Args:
        sampler: yields indices or (index, draw) and has `dataset` with `aspect_ratios()`.
        batch_size: pictures per batch.
        drop_last: leave out the smaller batches at the end of a sampler that ends.
        edges: increasing bounds between bins; (1.0,) separates landscape from portrait.
    """

    def __init__(
        self, sampler: Any, batch_size: int, *, drop_last: bool = False, edges: tuple[float, ...] = _EDGES
    ) -> None:
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size=}')
        if list(edges) != sorted(edges):
            raise ValueError(f'edges must increase, got {edges=}')
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self._bins = np.searchsorted(np.asarray(edges), np.asarray(sampler.dataset.aspect_ratios()), side='right')
        self._start = 0

    def start_at(self, draw: int) -> None:
        """As RestartableSampler.start_at: iteration * batch_size * world_size. The batches before are only counted."""
        world_size = getattr(self.sampler, 'world_size', 1)
        self._start, rest = divmod(draw, self.batch_size * world_size)
        if rest:
            whole = self.batch_size * world_size
            raise ValueError(f'draw must be a multiple of batch_size * ranks = {whole}, got {draw=}')

    def __iter__(self) -> Iterator[list[Any]]:
        for number, batch in enumerate(self._batches()):
            if number >= self._start:
                yield batch

    def _batches(self) -> Iterator[list[Any]]:
        queues: dict[int, list[Any]] = {}
        for key in self.sampler:
            index = key[0] if isinstance(key, tuple) else key
            queue = queues.setdefault(int(self._bins[index]), [])
            queue.append(key)
            if len(queue) == self.batch_size:
                yield list(queue)
                queue.clear()
        if not self.drop_last:
            yield from (queue for _, queue in sorted(queues.items()) if queue)

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)
