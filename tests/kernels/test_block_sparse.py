"""Without this a block of queries could see keys it must not, or rows that see nothing could become NaN."""

import pytest
import torch

from densezoo.kernels import block_sparse_attention, explain

# N, M, block; ragged last blocks first
SIZES = [(1, 1, 4), (5, 9, 4), (9, 3, 4), (8, 8, 2), (7, 7, 16), (12, 8, 3)]
HEADS, WIDTH = 2, 3


def arguments(N, M, block, occupied=0.5, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, HEADS, n, WIDTH, generator=g, dtype=torch.float64).to(dtype) for n in (N, M, M))
    mask = torch.rand(batch, HEADS, -(-N // block), -(-M // block), generator=g) < occupied
    mask[0, 0, 0] = False  # queries that see nothing
    return q, k, v, mask


def by_hand(q, k, v, mask, block, scale=None):
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if mask[b, h, i // block, j // block]]
                if seen:
                    logits = (k[b, h, seen] @ q[b, h, i]) * (scale or WIDTH**-0.5)
                    out[b, h, i] = logits.softmax(0) @ v[b, h, seen]
    return out


@pytest.mark.parametrize('occupied', [0, 0.3, 1])
@pytest.mark.parametrize(('N', 'M', 'block'), SIZES)
def test_formula_both_ways(N, M, block, occupied, monkeypatch):
    given = arguments(N, M, block, occupied)
    expected = by_hand(*given, block)
    for crossover, path in ((2.0, 'gather'), (-1.0, 'torch')):
        monkeypatch.setattr('densezoo.kernels.block_sparse.CROSSOVER', crossover)
        assert explain(block_sparse_attention, *given, block=block).backend == path
        torch.testing.assert_close(block_sparse_attention(*given, block=block), expected)
    assert not block_sparse_attention(*given, block=block)[0, 0, 0].any()


def test_masks_are_shared_and_scale_is_used():
    q, k, v, mask = arguments(8, 8, 2)
    for smaller in (mask[0, 0], mask[:1], mask[0, :1], mask[:, :1]):
        full = smaller.expand(2, HEADS, 4, 4) if smaller.ndim != 3 else smaller[None].expand(2, HEADS, 4, 4)
        ours = block_sparse_attention(q, k, v, smaller, block=2, scale=0.2)
        torch.testing.assert_close(ours, by_hand(q, k, v, full, 2, 0.2))


@pytest.mark.parametrize('backend', [None, 'torch'])
def test_gradient(backend):
    *given, mask = arguments(5, 7, 2, 0.3, batch=1)

    def call(q, k, v):
        return block_sparse_attention(q, k, v, mask, block=2, backend=backend)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in given])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_types_and_views(dtype):
    q, k, v, mask = arguments(9, 9, 4, 0.3)
    expected = block_sparse_attention(q, k, v, mask, block=4)
    views = [t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 0.03}[dtype]
    for backend in (None, 'torch'):
        ours = block_sparse_attention(*views, mask, block=4, backend=backend)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_compiles_into_one_graph():
    given = arguments(9, 9, 4, 0.3)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(*given, block=4), block_sparse_attention(*given, block=4))


@pytest.mark.parametrize(
    ('change', 'error', 'text'),
    [
        ({'q': torch.zeros(4, 6)}, ValueError, r'q must be \(B, h, N, d\), k and v \(B, h, M, d\)'),
        ({'k': torch.zeros(1, 2, 4, 3).half()}, ValueError, 'q, k and v must be of one type, all on one device'),
        ({'mask': torch.zeros(2, 2, device='meta').bool()}, ValueError, 'all on one device, .* mask on meta'),
        ({'mask': torch.zeros(2, 2)}, TypeError, 'mask must be bool, got torch.float32'),
        ({'mask': torch.zeros(2, 3).bool()}, ValueError, r'mask must be \(1, 2, 2, 2\), one value per block of 2'),
        ({'mask': torch.zeros(1, 3, 2, 2).bool()}, ValueError, r'or 1 in place of 1 or 2, got .*\(1, 3, 2, 2\)'),
        ({'block': 0}, ValueError, 'block must be positive, got block=0'),
        ({'backend': 'triton'}, ValueError, 'blocks have 2 tokens, and the kernels take powers of two from 16'),
        ({'backend': 'triton', 'block': 16, 'mask': torch.ones(1, 1).bool()}, ValueError, 'q is on cpu, and Triton'),
    ],
)
def test_errors(change, error, text):
    given = {'q': torch.zeros(1, 2, 4, 3), 'k': torch.zeros(1, 2, 4, 3), 'v': torch.zeros(1, 2, 4, 3)}
    with pytest.raises(error, match=text) as caught:
        block_sparse_attention(**{**given, 'mask': torch.zeros(2, 2).bool(), 'block': 2, **change})
    assert '\n' not in str(caught.value)
