"""Without this ReLU linear attention could be wrong on small maps, overflow in half precision, or mix heads."""

import pytest
import torch

from densezoo.kernels import relu_linear_attention, use


def by_hand(qkv, heads, eps):
    """The formula, one query at a time."""
    B, H, W, C3 = qkv.shape
    q, k, v = qkv.reshape(B, H * W, heads, 3, -1).unbind(3)
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(heads):
            for i in range(H * W):
                product = torch.stack([q[b, i, h].relu() @ k[b, j, h].relu() for j in range(H * W)])
                out[b, i, h] = (product[:, None] * v[b, :, h]).sum(0) / (product.sum() + eps)
    return out.reshape(B, H, W, C3 // 3)


# the first two have fewer positions than a head has channels
@pytest.mark.parametrize('size', [(1, 1), (2, 3), (1, 8), (3, 5)])
def test_formula(size):
    qkv = torch.randn(2, *size, 2 * 3 * 7, dtype=torch.float64)
    torch.testing.assert_close(relu_linear_attention(qkv, heads=2), by_hand(qkv, 2, 1e-15))
    torch.testing.assert_close(relu_linear_attention(qkv, heads=2, eps=0.5), by_hand(qkv, 2, 0.5))


@pytest.mark.parametrize('size', [(1, 3), (3, 4)])
def test_gradient(size):
    qkv = torch.randn(1, *size, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: relu_linear_attention(x, heads=2, eps=0.1), (qkv,))


def test_nothing_attended_is_zero():
    qkv = torch.randn(1, 4, 4, 24)
    qkv[..., :4] = -1  # the first head's queries
    assert not relu_linear_attention(qkv, heads=2)[..., :4].any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [(2, 3), (64, 64)])
def test_sums_are_float32_in_half_precision(dtype, size):
    qkv = (8 * torch.rand(1, *size, 48)).to(dtype)  # sums of about 64 * 4096 leave float16's range
    with torch.autocast('cpu', torch.bfloat16):
        out = relu_linear_attention(qkv, heads=2)
    assert out.dtype == dtype
    torch.testing.assert_close(out, relu_linear_attention(qkv.float(), heads=2).to(dtype))


@pytest.mark.parametrize(
    ('shape', 'options', 'message'),
    [
        ((2, 3, 24), {'heads': 2}, r'qkv must be \(B, H, W, 3C\), got tuple\(qkv\.shape\)=\(2, 3, 24\)'),
        ((1, 2, 2, 24), {'heads': 3}, 'heads must divide the channels of q, k and v, got heads=3'),
        ((1, 2, 2, 24), {'heads': 2, 'backend': 'triton'}, "cannot run with backend='triton': .*use backend='torch'"),
    ],
)
def test_errors(shape, options, message):
    with pytest.raises(ValueError, match=message):
        relu_linear_attention(torch.zeros(shape), **options)


def test_use():
    qkv = torch.randn(1, 3, 3, 24)
    with use('torch'):
        assert torch.equal(relu_linear_attention(qkv, heads=2), relu_linear_attention(qkv, heads=2, backend='torch'))
