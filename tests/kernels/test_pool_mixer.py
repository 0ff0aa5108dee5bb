"""Without this the pooling mixer could be wrong at borders, at tiny maps, or under a forced backend."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.kernels import pool_mixer, use
from densezoo.kernels.dispatch import select

SIZES = [(1, 1), (1, 5), (2, 2), (3, 4), (7, 7), (9, 14)]


def by_hand(x, pool_size):
    """The formula, one position at a time."""
    out, r = torch.empty_like(x), pool_size // 2
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            window = x[:, max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1]
            out[:, i, j] = window.mean((1, 2)) - x[:, i, j]
    return out


@pytest.mark.parametrize('pool_size', [1, 3, 5])
@pytest.mark.parametrize('size', SIZES)
def test_formula(size, pool_size):
    x = torch.randn(2, *size, 5, dtype=torch.float64)
    torch.testing.assert_close(pool_mixer(x, pool_size), by_hand(x, pool_size))


def test_gradient_and_layouts():
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool_mixer, (x,))
    other = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # (B, H, W, C) over channels-first memory
    torch.testing.assert_close(pool_mixer(other), pool_mixer(x))
    assert pool_mixer(x.detach()).is_contiguous()


@pytest.mark.parametrize('bias', [True, False])
def test_norm_is_applied_first(bias):
    x = torch.randn(2, 4, 6, 8) + 3
    weight, shift = torch.rand(8) + 0.5, torch.randn(8) if bias else None
    normed = F.group_norm(x.permute(0, 3, 1, 2), 1, weight, shift, 1e-5).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool_mixer(x, norm=(weight, shift, 1e-5)), pool_mixer(normed))


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        ({'x': torch.zeros(2, 3, 4)}, r'x must be \(B, H, W, C\), got tuple\(x\.shape\)=\(2, 3, 4\)'),
        ({'x': torch.zeros(1, 2, 2, 3), 'pool_size': 2}, 'positive odd number, got pool_size=2'),
        ({'x': torch.zeros(1, 2, 2, 3), 'pool_size': -1}, 'got pool_size=-1'),
        (
            {'x': torch.zeros(1, 2, 2, 3), 'norm': (torch.ones(4), None, 1e-5)},
            r'weight of norm must be \(3,\).*got \(4,\)',
        ),
        (
            {'x': torch.zeros(1, 2, 2, 3), 'backend': 'cuda'},
            "backend must be one of auto, triton, torch, got backend='cuda'",
        ),
        (
            {'x': torch.zeros(1, 2, 2, 3), 'backend': 'triton'},
            "cannot run with backend='triton': .*use backend='torch'",
        ),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=text):
        pool_mixer(**arguments)


def test_use_forces_a_backend_and_restores_the_choice():
    refusals = {'triton': None, 'torch': None}
    assert select('op', None, refusals) == 'triton'
    assert select('op', None, {'triton': 'no GPU', 'torch': None}) == 'torch'
    with use('torch'):
        assert select('op', None, refusals) == 'torch'
        assert select('op', 'triton', refusals) == 'triton'  # the caller's own word goes first
        with use(None):
            assert select('op', None, refusals) == 'triton'
        with pytest.raises(ZeroDivisionError), use('triton'):
            1 / 0  # noqa: B018
        assert select('op', None, refusals) == 'torch'
    assert select('op', None, refusals) == 'triton'
    with pytest.raises(ValueError, match='backend must be one of'), use('cuda'):
        pass
