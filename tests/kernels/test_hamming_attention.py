"""Without this the threshold that replaces softmax could choose other keys, or the linear-time form miss its sum."""

import math

import pytest
import torch

from densezoo.kernels import hamming_attention, hashed_attention


def codes(N, M, d):
    g = torch.Generator().manual_seed(N)
    q, k, v = (torch.randn(2, 3, n, d, generator=g) for n in (N, M, M))
    q[q.abs() < 0.1] = 0
    return q, k, v


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('threshold', [0.25, 0.9, None])
@pytest.mark.parametrize('size', [(1, 1, 3), (3, 5, 4), (49, 49, 32)])
def test_formula(size, threshold, biased):
    q, k, v = codes(*size)
    bias = torch.randn(3, size[0], size[1], generator=torch.Generator().manual_seed(1)) if biased else None
    out = hamming_attention(q, k, v, threshold=threshold, bias=bias)
    logits = size[2] ** -0.5 * (q.sign().double() @ k.sign().double().transpose(-1, -2))
    logits = logits if bias is None else logits + bias
    weight = logits.softmax(-1)
    chosen = logits > 0 if threshold is None else weight >= threshold * weight.amax(-1, keepdim=True)
    assert torch.equal(out, (chosen.double() @ v.sign().double()).float())
    assert torch.equal(out, out.round())


def test_masked_keys_are_not_counted():
    q, k, v = codes(4, 6, 8)
    bias = torch.zeros(6)
    bias[3:] = -math.inf
    assert torch.equal(hamming_attention(q, k, v, bias=bias), hamming_attention(q, k[:, :, :3], v[:, :, :3]))


def test_any_leading_axes():
    q, k, v = codes(4, 6, 8)
    bias = torch.randn(3, 4, 6)
    wanted = hamming_attention(q, k, v, bias=bias)
    assert torch.equal(hamming_attention(q[:, None], k[:, None], v[:, None], bias=bias), wanted[:, None])
    assert torch.equal(hamming_attention(q[0, 0], k[0, 0], v[0, 0], bias=bias[0]), wanted[0, 0])


def test_half_precision_counts_beyond_its_whole_numbers():
    q = k = torch.ones(1, 1, 3001, 4)  # every key is chosen: float16 has no 3001
    out = hamming_attention(q.half(), k.half(), torch.ones_like(q).half())
    assert out.dtype == torch.float16 and (out == torch.tensor(3001.0).half()).all()


@pytest.mark.parametrize('own_value', [True, False])
@pytest.mark.parametrize('N', [1, 7])
def test_linear_time_form(N, own_value):
    g = torch.Generator().manual_seed(N)
    q, k = (torch.randn(2, 3, N, 5, generator=g).sign().double() for _ in range(2))
    v = torch.randn(2, 3, N, 4, generator=g).double()
    similarity = q @ k.transpose(-1, -2)
    total = (similarity + 6).sum(-1, keepdim=True)
    numerator = similarity @ v + 6 * (v if own_value else v.sum(-2, keepdim=True))
    torch.testing.assert_close(hashed_attention(q, k, v, own_value=own_value), numerator / total)
    if not own_value:  # the formula that it is meant to be: attention with weights n + 1 + c . k
        torch.testing.assert_close(hashed_attention(q, k, v, own_value=False), (similarity + 6) @ v / total)


def test_gradient_of_the_linear_time_form():
    inputs = [torch.randn(1, 2, 3, n, dtype=torch.float64, requires_grad=True) for n in (4, 4, 5)]
    assert torch.autograd.gradcheck(hashed_attention, inputs)


ZERO = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ('call', 'text'),
    [
        (lambda: hamming_attention(ZERO[0], ZERO, ZERO), 'query and key must agree but for N and M'),
        (lambda: hamming_attention(ZERO, ZERO, ZERO[..., :2]), r'query must be \(\.\.\., N, d\), key and value'),
        (lambda: hamming_attention(ZERO[..., :2], ZERO, ZERO), 'query and key must agree but for N and M'),
        (lambda: hamming_attention(ZERO, ZERO, ZERO, threshold=0.0), 'threshold must be above 0 and at most 1'),
        (lambda: hamming_attention(ZERO, ZERO, ZERO, scale=0.0), r'scale must be positive, got scale=0\.0'),
        (lambda: hamming_attention(ZERO, ZERO, ZERO, bias=ZERO), r'bias must broadcast to \(1, 2, 3, 3\), got'),
        (lambda: hamming_attention(ZERO, ZERO, ZERO, backend='triton'), "cannot run with backend='triton'"),
        (lambda: hashed_attention(ZERO, ZERO[..., :2], ZERO), r'query and key must be \(B, h, N, n\) and value'),
        (lambda: hashed_attention(ZERO, ZERO, ZERO, backend='triton'), 'no Triton kernel is written for it'),
    ],
)
def test_bad_calls(call, text):
    with pytest.raises(ValueError, match=text) as caught:
        call()
    assert '\n' not in str(caught.value)
