"""Without this the Triton kernels of block-sparse, neighborhood and binary attention, of matching and merging and of
binary and shift layers are never executed."""

import pytest
import torch

from densezoo.kernels import (
    binary_linear,
    block_sparse_attention,
    hamming_attention,
    match_tokens,
    mean_to_places,
    neighborhood_attention,
    pack_bits,
    pack_shift_sums,
    pack_shifts,
    shift_linear,
    token_merge,
)


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


def pair(call, *tensors, tolerance=1e-5):
    """Triton's result against the reference's in float64."""
    ours = call('triton', *tensors)
    expected = call('torch', *(t.double() if t.is_floating_point() else t for t in tensors))
    assert ours.dtype == tensors[0].dtype and ours.shape == expected.shape
    scale = expected.abs().max().clamp(1).item()
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * scale)


def merging(B, N, left, seed=0):
    """Where rows go: `left` of them stay, in any order, the others anywhere, most to the first places."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(N, generator=g) for _ in range(B)])
    kept, moved = rows[:, :left], rows[:, left:]
    target = (left * torch.rand(moved.shape, generator=g) ** 2).long()
    place = torch.empty_like(rows).scatter(1, kept, torch.arange(left).expand(B, -1)).scatter(1, moved, target)
    return torch.rand(B, N, 1, generator=g), place, kept, moved


@pytest.mark.parametrize(('B', 'N', 'left', 'C'), [(1, 1, 1, 1), (2, 9, 9, 3), (2, 30, 7, 5), (3, 12, 1, 130)])
def test_merging(B, N, left, C):
    share, *where = merging(B, N, left)
    x = torch.randn(B, N, C)
    both(lambda backend, x, share: mean_to_places(x, share, *where, backend=backend), x, share)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_merging_views_in_half_precision(dtype):
    share, *where = merging(2, 20, 9)
    wide = torch.randn(20, 2, 48).to(dtype)
    x = wide[:, :, :24].transpose(0, 1)

    def call(backend, x):
        return mean_to_places(x, share.to(x.dtype), *where, backend=backend)

    both(call, x, tolerance=0.01 if dtype == torch.float16 else 0.05)
    assert torch.equal(call('triton', x), call('triton', x.contiguous()))


def test_merging_of_what_was_matched():
    metric, x = torch.randn(2, 21, 8), torch.randn(2, 21, 6)
    size = torch.randint(1, 4, (2, 21, 1)).float()
    matching = match_tokens(metric, 7, class_token=True, distill_token=True)
    both(lambda backend, x, size: token_merge(x, matching, size.to(x.dtype), backend=backend)[0], x, size)


@pytest.mark.parametrize('input_signs', [True, False])
@pytest.mark.parametrize(('M', 'K', 'N'), [(1, 1, 1), (17, 40, 65)])
def test_binary_linear(M, K, N, input_signs):
    g = torch.Generator().manual_seed(M)
    x, w = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g)
    x[x.abs() < 0.3] = 0
    w[w.abs() < 0.3] = 0
    scale, bias = torch.rand(N, generator=g), torch.randn(N, generator=g)
    for nonzero in (None, pack_bits(w != 0)):

        def call(backend, x, packed, *rest, nonzero=nonzero):
            return binary_linear(x, packed, *rest, nonzero=nonzero, input_signs=input_signs, backend=backend)

        pair(call, x, pack_bits(w > 0), scale, bias)
    pair(call, x[:3].T.contiguous().T.bfloat16(), pack_bits(w > 0), tolerance=0.02)


@pytest.mark.parametrize(('bits', 'M', 'K', 'N'), [(5, 3, 40, 66), (8, 18, 5, 3)])
def test_shift_linear(bits, M, K, N):
    g = torch.Generator().manual_seed(M)
    depth, sign = torch.randint(0, 15, (N, K), generator=g), torch.randint(-1, 2, (N, K), generator=g)
    packed, x, bias = pack_shifts(depth, sign, bits=bits), torch.randn(M, K, generator=g), torch.randn(N, generator=g)

    def call(backend, x, *rest):
        return shift_linear(x, packed, *rest, bits=bits, fixed=(4, 6), backend=backend)

    pair(call, x, bias)
    pair(call, x.half(), tolerance=0.01)


def test_shift_linear_of_sums():
    g = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 4, (2, 66, 40), generator=g)
    packed = pack_shift_sums(first, second, torch.randint(-1, 2, (66, 40), generator=g))
    x, bias = torch.randn(3, 40, generator=g), torch.randn(66, generator=g)

    def call(backend, x, *rest):
        return shift_linear(x, packed, *rest, terms=2, fixed=(4, 6), backend=backend)

    pair(call, x, bias)
    pair(call, x.half(), tolerance=0.01)


@pytest.mark.parametrize(('N', 'M', 'd'), [(1, 1, 3), (7, 20, 17)])
def test_hamming_attention(N, M, d):
    q, k, v = torch.randn(2, 3, N, d), torch.randn(2, 3, M, d), torch.randn(2, 3, M, d)
    q[q.abs() < 0.1] = 0
    masks = torch.randn(2, 1, N, M)  # of two windows
    for threshold, bias in ((0.25, None), (None, torch.randn(3, N, M)), (0.25, torch.randn(2, 1, 1, M))):

        def call(backend, *given, threshold=threshold, bias=bias):
            return hamming_attention(*given, threshold=threshold, bias=bias, backend=backend)

        pair(call, q, k.bfloat16(), v)
    windows = [t.expand(2, 2, *t.shape[2:]) for t in (q[:, None], k[:, None], v[:, None])]
    pair(lambda backend, *given: hamming_attention(*given, bias=masks, backend=backend), *windows)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(call('triton', *views), call('triton', q, k, v))
