"""Without this the Triton kernels of block-sparse and neighborhood attention and of matching are never executed."""

import pytest
import torch

from densezoo.kernels import block_sparse_attention, match_tokens, neighborhood_attention


def both(call, *tensors, tolerance=1e-5):
    """Results and gradients of both backends, the reference in float64."""
    found = []
    for backend, dtype in (('triton', None), ('torch', torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        out = call(backend, *leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found.append([out, *torch.autograd.grad((out.double() * weight).sum(), leaves, materialize_grads=True)])
    for ours, expected in zip(*found, strict=True):
        scale = expected.abs().max().clamp(1).item()
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * scale)
    assert found[0][0].dtype == tensors[0].dtype


@pytest.mark.parametrize(('N', 'M', 'block', 'width'), [(5, 3, 16, 4), (40, 50, 16, 5), (70, 140, 64, 40)])
def test_block_sparse(N, M, block, width):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, width, generator=g) for n in (N, M, M))
    mask = torch.rand(1, 2, -(-N // block), -(-M // block), generator=g) < 0.5
    mask[0, 0, 0] = False
    both(lambda backend, *given: block_sparse_attention(*given, mask, block=block, backend=backend), q, k, v)
    assert not block_sparse_attention(q, k, v, mask, block=block, backend='triton')[0, 0, :block].any()


def test_block_sparse_shares_a_mask_and_reads_views():
    q, k, v = torch.randn(2, 33, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    mask = torch.rand(3, 3) < 0.6

    def call(backend, *given):
        return block_sparse_attention(*given, mask, block=16, backend=backend)

    both(call, q.bfloat16(), k.bfloat16(), v.bfloat16(), tolerance=0.05)
    assert torch.equal(call('triton', q, k, v), call('triton', *(t.contiguous() for t in (q, k, v))))


@pytest.mark.parametrize(
    ('size', 'kernel', 'dilation', 'width'),
    [
        ((1, 1), (3, 3), (1, 1), 3),
        ((3, 4), (5, 7), (1, 1), 3),
        ((5, 7), (3, 2), (2, 3), 4),
        ((10, 9), (3, 5), (1, 1), 40),
        ((19, 3), (4, 3), (2, 1), 8),
    ],
)
@pytest.mark.parametrize('biased', [True, False])
def test_neighborhood(size, kernel, dilation, width, biased):
    qkv, bias = torch.randn(1, *size, 6 * width), torch.randn(2, 2 * kernel[0] - 1, 2 * kernel[1] - 1)

    def call(backend, qkv, bias):
        options = {'heads': 2, 'dilation': dilation, 'bias': bias if biased else None}
        return neighborhood_attention(qkv, kernel, **options, backend=backend)

    both(call, qkv, bias)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_neighborhood_in_half_precision(dtype):
    tolerance = 0.01 if dtype == torch.float16 else 0.05
    qkv = torch.randn(1, 5, 6, 24).to(dtype).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    both(lambda backend, qkv: neighborhood_attention(qkv, 3, heads=1, backend=backend), qkv, tolerance=tolerance)


@pytest.mark.parametrize('N', [2, 9, 70])
@pytest.mark.parametrize('protected', [(False, False), (True, False), (True, True)])
def test_matching(N, protected):
    metric = torch.randn(2, N, 5, generator=torch.Generator().manual_seed(N))
    options = dict(zip(('class_token', 'distill_token'), protected))
    ours, expected = (match_tokens(metric, 3, **options, backend=backend) for backend in ('triton', 'torch'))
    for name in ('stay', 'source', 'target'):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
