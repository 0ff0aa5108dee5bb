"""Without this windows could be cut at the border instead of shifted inward, or take another pair's bias."""

import pytest
import torch

from densezoo.kernels import neighborhood_attention

# size, kernel, dilation; ugly ones first
CASES = {
    'one position': ((1, 1), (3, 3), (1, 1)),
    'one row': ((1, 7), (3, 3), (1, 1)),
    'smaller than the window': ((3, 4), (5, 7), (1, 1)),
    'phases of different length': ((5, 7), (3, 2), (2, 3)),
    'square': ((6, 5), (3, 3), (1, 1)),
    'even': ((5, 6), (2, 4), (1, 1)),
    'whole map': ((5, 5), (5, 5), (1, 1)),
    'dilated': ((8, 9), (3, 3), (2, 2)),
}
EACH = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
HEADS, WIDTH = 2, 3


def arguments(case, biased=True):
    size, kernel, dilation = case
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, *size, 3 * HEADS * WIDTH, generator=g, dtype=torch.float64)
    bias = torch.randn(HEADS, 2 * kernel[0] - 1, 2 * kernel[1] - 1, generator=g, dtype=torch.float64)
    return qkv, kernel, {'heads': HEADS, 'dilation': dilation, 'bias': bias if biased else None}


def window(i, length, kernel, dilation):
    """The positions that i sees along an axis: the window around it, moved until it is on the map."""
    same = list(range(i % dilation, length, dilation))
    here = same.index(i)
    low = here - kernel // 2
    while low + kernel > len(same):
        low -= 1
    low = max(low, 0)
    return [(same[m], m - here) for m in range(low, min(low + kernel, len(same)))]


def by_hand(qkv, kernel, heads, dilation, bias):
    B, H, W, C3 = qkv.shape
    q, k, v = qkv.view(B, H, W, 3, heads, -1).unbind(3)
    out = torch.empty_like(q)
    for i in range(H):
        for j in range(W):
            seen = [
                (y, x, dy, dx)
                for y, dy in window(i, H, kernel[0], dilation[0])
                for x, dx in window(j, W, kernel[1], dilation[1])
            ]
            for h in range(heads):
                logits = torch.stack([(q[:, i, j, h] * k[:, y, x, h]).sum(-1) for y, x, _, _ in seen], 1)
                logits = logits * (C3 // 3 // heads) ** -0.5
                if bias is not None:
                    table = [bias[h, dy + kernel[0] - 1, dx + kernel[1] - 1] for _, _, dy, dx in seen]
                    logits = logits + torch.stack(table)
                values = torch.stack([v[:, y, x, h] for y, x, _, _ in seen], 1)
                out[:, i, j, h] = (logits.softmax(1)[..., None] * values).sum(1)
    return out.reshape(B, H, W, C3 // 3)


@EACH
@pytest.mark.parametrize('biased', [True, False])
def test_formula(case, biased):
    qkv, kernel, options = arguments(case, biased)
    torch.testing.assert_close(neighborhood_attention(qkv, kernel, **options), by_hand(qkv, kernel, **options))


def test_a_window_as_large_as_the_map_is_attention():
    qkv, _, _ = arguments(CASES['whole map'])
    q, k, v = qkv.view(2, 25, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 5, -1)
    torch.testing.assert_close(neighborhood_attention(qkv, 5, heads=HEADS), expected)


def test_gradient():
    qkv, kernel, options = arguments(CASES['one row'])
    bias = options.pop('bias')

    def call(qkv, bias):
        return neighborhood_attention(qkv, kernel, bias=bias, **options)

    assert torch.autograd.gradcheck(call, (qkv[:1].requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_types_and_views(dtype):
    qkv, kernel, options = arguments(CASES['square'])
    expected = neighborhood_attention(qkv, kernel, scale=0.4, **options)
    view = qkv.to(dtype).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    ours = neighborhood_attention(view, kernel, scale=0.4, **options)
    assert ours.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_compiles_into_one_graph():
    qkv, kernel, options = arguments(CASES['square'])
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(qkv, kernel, **options), neighborhood_attention(qkv, kernel, **options))


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'qkv': torch.zeros(4, 4, 18)}, r'qkv must be \(B, H, W, 3C\), got .*\(4, 4, 18\)'),
        ({'heads': 4}, 'heads must divide the channels of q, k and v, got heads=4'),
        ({'kernel': 0}, r'kernel and dilation must be positive, got kernel=\(0, 0\)'),
        ({'dilation': 0}, r'kernel and dilation must be positive, .*dilation=\(0, 0\)'),
        ({'bias': torch.zeros(2, 3, 3)}, r'bias must be .* = \(2, 5, 5\), got .*\(2, 3, 3\)'),
        ({'bias': torch.zeros(2, 5, 5, device='meta')}, 'bias must be where qkv is, on cpu, got meta'),
        ({'backend': 'triton'}, "neighborhood_attention cannot run with backend='triton': qkv is on cpu"),
    ],
)
def test_errors(change, text):
    given = {'qkv': torch.zeros(1, 4, 4, 18), 'kernel': 3, 'heads': 2, **change}
    with pytest.raises(ValueError, match=text) as caught:
        neighborhood_attention(**given)
    assert '\n' not in str(caught.value)
