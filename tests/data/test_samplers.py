"""Without these, a resumed run would see other images than an uninterrupted one, and ranks the same ones."""

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from densezoo.data import AspectRatioBatchSampler, EvalSampler, RestartableSampler


class Pictures(list):
    """Numbers with a shape."""

    def aspect_ratios(self):
        return [0.5 + (index * 7 % 10) / 10 for index in self]


def take(sampler, count, start=0):
    sampler.start_at(start)
    return list(islice(sampler, count))


def ranks(make, world_size, monkeypatch):
    """One sampler for each rank."""
    samplers = []
    for rank in range(world_size):
        monkeypatch.setattr('densezoo.data.samplers._rank_and_world', lambda rank=rank: (rank, world_size))
        samplers.append(make())
    return samplers


@pytest.mark.parametrize('batch_size', [None, 4])
def test_each_pass_is_a_permutation(batch_size):
    sampler = RestartableSampler(range(10), seed=3, batch_size=batch_size)
    drawn = take(sampler, 30)
    assert [draw for _, draw in drawn] == list(range(30))
    length = len(sampler)
    assert length == (8 if batch_size else 10)
    passes = [[index for index, _ in drawn[start : start + length]] for start in (0, length, 2 * length)]
    assert all(len(set(one)) == length for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert take(RestartableSampler(range(10), seed=4, batch_size=batch_size), 10) != drawn[:10]


@pytest.mark.parametrize('start', [0, 1, 9, 10, 25])
def test_start_at_gives_the_tail(start):
    whole = take(RestartableSampler(range(10), seed=3), 40)
    assert take(RestartableSampler(range(10), seed=3), 40 - start, start) == whole[start:]


@pytest.mark.parametrize('world_size', [2, 3])
def test_ranks_share_one_sequence(world_size, monkeypatch):
    alone = take(RestartableSampler(range(10), seed=3), 30)
    shared = ranks(lambda: RestartableSampler(range(10), seed=3), world_size, monkeypatch)
    parts = [take(sampler, 10) for sampler in shared]
    assert sorted((pair for part in parts for pair in part), key=lambda pair: pair[1])[:30] == alone[: 10 * world_size]
    later = [take(sampler, 8, 2 * world_size) for sampler in shared]
    assert later == [part[2:] for part in parts]
    with pytest.raises(ValueError, match=f'draw must be a multiple of the {world_size} ranks, got draw=7'):
        shared[0].start_at(7)


def test_without_shuffling_the_order_repeats():
    assert [index for index, _ in take(RestartableSampler(range(3), shuffle=False), 7)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_dataset_smaller_than_a_batch_is_named():
    with pytest.raises(ValueError, match='dataset must hold a batch for every rank, got 3 images for batch_size=4'):
        RestartableSampler(range(3), batch_size=4)


@pytest.mark.parametrize('count, world_size', [(10, 1), (10, 2), (10, 3), (2, 3)])
def test_evaluation_sees_each_picture_once(count, world_size, monkeypatch):
    parts = [list(sampler) for sampler in ranks(lambda: EvalSampler(range(count), seed=None), world_size, monkeypatch)]
    assert len({len(part) for part in parts}) == 1
    interleaved = [index for row in zip(*parts) for index in row]
    assert interleaved[:count] == list(range(count))
    with pytest.raises(ValueError, match='EvalSampler goes in order'):
        EvalSampler(range(3), shuffle=True)


@pytest.mark.parametrize('edges', [(1.0,), (0.75, 1.0, 1.25), ()])
def test_batches_of_like_shapes(edges):
    data = Pictures(range(40))
    ratios = data.aspect_ratios()
    batches = take(AspectRatioBatchSampler(RestartableSampler(data), 4, edges=edges), 30)
    assert len(batches) == 30
    for batch in batches:
        bins = {sum(ratios[index] >= edge for edge in edges) for index, _ in batch}
        assert len(batch) == 4 and len(bins) == 1
    draws = [draw for batch in batches for _, draw in batch]
    assert len(set(draws)) == 120


def test_batches_restart_and_feed_a_loader():
    def sampler():
        return AspectRatioBatchSampler(RestartableSampler(Pictures(range(40)), seed=1), 4)

    whole = take(sampler(), 20)
    assert take(sampler(), 13, 7 * 4) == whole[7:]
    with pytest.raises(ValueError, match='draw must be a multiple of batch_size'):
        sampler().start_at(6)
    loader = DataLoader(torch.arange(40), batch_sampler=AspectRatioBatchSampler(EvalSampler(Pictures(range(40))), 4))
    assert sum(len(batch) for batch in loader) == 40


def test_a_sampler_that_ends_leaves_smaller_batches():
    data = Pictures(range(11))
    everything = list(AspectRatioBatchSampler(EvalSampler(data), 4))
    assert sorted(index for batch in everything for index in batch) == list(data)
    assert all(len(batch) == 4 for batch in AspectRatioBatchSampler(EvalSampler(data), 4, drop_last=True))
