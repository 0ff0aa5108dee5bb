"""Without this a prediction could be assigned to another picture's object, or to padding: assignments are compared with
the best of all permutations."""

import math
from itertools import permutations

import pytest
import torch

from densezoo.heads import hungarian as module
from densezoo.heads.hungarian import hungarian


def best_total(cost):
    """Least cost of min(Q, M) pairs, by trying all."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.t()
    rows = range(cost.shape[0])
    return min(sum(cost[q, t].item() for t, q in enumerate(p)) for p in permutations(rows, cost.shape[1]))


@pytest.mark.parametrize('counts', [(3, 0, 1), (0, 0), (7, 2), (4, 4)], ids=str)  # 7 > 5 queries
def test_best_of_all_permutations(counts):
    costs = torch.randn(2, len(counts), 5, max(1, *counts), generator=torch.Generator().manual_seed(0))
    for i, count in enumerate(counts):
        costs[:, i, :, count:] = -100.0  # padding must not attract
    matched = hungarian(costs, counts)
    assert matched.shape == costs.shape[:-1] and matched.dtype == torch.int64
    for layer, pictures in enumerate(matched):
        for i, count in enumerate(counts):
            query = (pictures[i] >= 0).nonzero()[:, 0]
            chosen = pictures[i, query]
            assert len(query) == len(set(chosen.tolist())) == min(5, count) and (chosen < count).all()
            if count:
                total = costs[layer, i][query, chosen].sum().item()
                assert math.isclose(total, best_total(costs[layer, i, :, :count]), rel_tol=1e-5)


def test_costs_that_are_no_numbers_are_avoided():
    cost = torch.tensor([[[math.nan, 1.0], [0.0, math.inf], [5.0, 5.0]]])
    assert hungarian(cost, [2]).tolist() == [[1, 0, -1]]
    assert (hungarian(torch.full((1, 3, 2), math.nan), [2]) >= 0).sum() == 2


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r'counts must be 2 numbers in 0\.\.4, .* got \[5, 1\]'):
        hungarian(torch.zeros(2, 3, 4), [5, 1])
    with pytest.raises(ValueError, match=r'counts must be 2 numbers .* got \[1\]'):
        hungarian(torch.zeros(2, 3, 4), [1])
    monkeypatch.setattr(module, 'linear_sum_assignment', None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install 'densezoo\[train\]'"):
        hungarian(torch.zeros(1, 3, 4), [1])
