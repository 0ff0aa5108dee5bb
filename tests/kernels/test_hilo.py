"""Without this HiLo attention could be wrong where windows do not divide the map, or take branches that do not fit."""

import pytest
import torch

from densezoo.kernels import hilo_attention, use

SIZES = [(1, 1), (1, 5), (2, 2), (3, 4), (7, 7), (4, 9)]
HIGH, LOW, D = 2, 3, 4  # heads of the branches and their width


def branches(B, H, W, window, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    pooled = (-(-H // window), -(-W // window))
    shapes = (B, H, W, 3 * HIGH * D), (B, H, W, LOW * D), (B, *pooled, 2 * LOW * D), (3 * HIGH * D,)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def by_hand(qkv, query, key_value, window, outside):
    """The formula, one head and one query at a time."""
    B, H, W, _ = query.shape
    high, low = torch.empty(B, H, W, HIGH * D).to(qkv), torch.empty_like(query)

    def attend(q, keys, values):
        return torch.softmax(D**-0.5 * keys @ q, 0) @ values

    for b in range(B):
        for i in range(H):
            for j in range(W):
                top, left = i // window * window, j // window * window
                rows = []
                for u in range(top, top + window):
                    for v in range(left, left + window):
                        if u < H and v < W:
                            rows.append(qkv[b, u, v])
                        elif outside is not None:
                            rows.append(outside)
                rows = torch.stack(rows).view(-1, 3, HIGH, D)
                own = qkv[b, i, j].view(3, HIGH, D)
                for h in range(HIGH):
                    high[b, i, j, h * D : (h + 1) * D] = attend(own[0, h], rows[:, 1, h], rows[:, 2, h])
                pooled = key_value[b].reshape(-1, 2, LOW, D)
                for h in range(LOW):
                    part = slice(h * D, (h + 1) * D)
                    low[b, i, j, part] = attend(query[b, i, j, part], pooled[:, 0, h], pooled[:, 1, h])
    return high, low


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('window', [1, 2, 3])
@pytest.mark.parametrize('size', SIZES)
def test_formula(size, window, masked):
    qkv, query, key_value, outside = branches(2, *size, window)
    outside = None if masked else outside
    ours = hilo_attention(qkv, query, key_value, window, heads=(HIGH, LOW), outside=outside)
    for a, b in zip(ours, by_hand(qkv, query, key_value, window, outside), strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()


def test_gradient():
    inputs = [t.requires_grad_() for t in branches(1, 3, 2, 2)]

    def call(qkv, query, key_value, outside):
        return hilo_attention(qkv, query, key_value, 2, heads=(HIGH, LOW), outside=outside)

    assert torch.autograd.gradcheck(call, inputs)


def test_scale():
    qkv, query, key_value, outside = branches(1, 4, 4, 2)
    wanted = hilo_attention(qkv, query, key_value, 2, heads=(HIGH, LOW), outside=outside, scale=1.0)
    qkv, query = qkv.clone(), query * 2  # D ** -0.5 is a half
    qkv[..., : HIGH * D] *= 2
    outside[: HIGH * D] *= 2
    ours = hilo_attention(qkv, query, key_value, 2, heads=(HIGH, LOW), outside=outside)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'qkv': torch.zeros(1, 4, 24)}, 'must have four dimensions'),
        ({'window': 0}, r'must be positive, got window=0'),
        ({'heads': (0, 3)}, r'must be positive, got window=2, heads=\(0, 3\)'),
        ({'heads': (5, 3)}, r'heads must divide the channels of their branch, got heads=\(5, 3\)'),
        ({'heads': (2, 5)}, r'heads must divide the channels of their branch, got heads=\(2, 5\)'),
        ({'query': torch.zeros(1, 4, 5, 12)}, 'must be of one map'),
        ({'key_value': torch.zeros(1, 2, 3, 24)}, r'key_value must be \(1, 2, 2, 24\), one position for each window'),
        ({'outside': torch.zeros(3)}, r'outside must be \(24,\), one row of qkv'),
        ({'backend': 'triton'}, "cannot run with backend='triton': .*use backend='torch'"),
    ],
)
def test_bad_calls(change, text):
    qkv, query, key_value, outside = branches(1, 4, 4, 2, torch.float32)
    arguments = {'qkv': qkv, 'query': query, 'key_value': key_value, 'window': 2, 'heads': (HIGH, LOW)}
    arguments |= {'outside': outside, **change}
    with pytest.raises(ValueError, match=text) as caught:
        hilo_attention(**arguments)
    assert '\n' not in str(caught.value)


def test_exporters_take_the_reference():
    qkv, query, key_value, _ = branches(1, 4, 4, 2)
    with use('torch'):
        assert hilo_attention(qkv, query, key_value, 2, heads=(HIGH, LOW))[1].shape == query.shape
