"""Without this PRepBN could reach the end of a training as a mixture that no evaluation ever computes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from densezoo.backbones.layers import PRepBN, RepBN
from densezoo.train.hooks import DEFAULT_HOOKS, NormSchedule


def progress(norm):
    return norm.warm.item(), norm.iter.item() / norm.total_step.item()


def test_share_follows_the_iteration():
    norms = nn.Sequential(PRepBN(4), nn.Sequential(PRepBN(4), RepBN(4)))
    runner = SimpleNamespace(model=norms, iter=0, max_iters=100)
    hook = NormSchedule(warm=0.1, until=0.5)
    hook.before_train(runner)
    for iteration, expected in [(0, (10, 1)), (9, (1, 1)), (10, (0, 1)), (20, (0, 0.75)), (50, (0, 0)), (99, (0, 0))]:
        runner.iter = iteration  # a resumed run starts anywhere
        hook.before_train_iter(runner, 0)
        assert progress(norms[0]) == progress(norms[1][0]) == expected


def test_finished_weights_stay_batch_norms():
    norm = PRepBN(4)
    hook = NormSchedule(until=0)
    runner = SimpleNamespace(model=norm, iter=0, max_iters=100)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    x = torch.randn(8, 4)
    torch.testing.assert_close(norm.train()(x), RepBN(4).train()(x))


def test_in_every_run_and_closed_to_nonsense():
    assert DEFAULT_HOOKS['norm_schedule'] is NormSchedule
    with pytest.raises(ValueError, match=r'0 <= warm <= until <= 1, got warm=0.5, until=0.2'):
        NormSchedule(warm=0.5, until=0.2)
