"""Without this filters as large as the map could wrap around its border, be mirrored, or differ where exported."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.kernels import long_convolution
from densezoo.kernels.long_convolution import long_convolution_fft, long_convolution_reference

SIZES = [(1, 1), (1, 5), (2, 2), (3, 4), (7, 7), (9, 14)]


def direct(x, filters):
    """F.conv2d correlates, so the filter is turned; padding reaches every offset."""
    _, H, W, C = x.shape
    kernel = filters.flip(0, 1).permute(2, 0, 1)[:, None]
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=(H - 1, W - 1), groups=C).permute(0, 2, 3, 1)


def arguments(size, batch=2, channels=5):
    H, W = size
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, H, W, channels, generator=generator),
        torch.randn(2 * H - 1, 2 * W - 1, channels, generator=generator),
    )


@pytest.mark.parametrize('compute', [long_convolution, long_convolution_reference, long_convolution_fft])
@pytest.mark.parametrize('size', SIZES)
def test_convolution(size, compute):
    x, filters = arguments(size)
    ours = compute(x, filters)
    assert ours.is_contiguous()
    expected = direct(x, filters)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6 * max(expected.abs().max().item(), 1))


def test_formula():
    x, filters = arguments((3, 4), batch=1, channels=1)
    out = long_convolution(x, filters)
    expected = sum(x[0, i, j, 0] * filters[2 - i + 2, 1 - j + 3, 0] for i in range(3) for j in range(4))
    torch.testing.assert_close(out[0, 2, 1, 0], expected)


def test_gradients_agree():
    results = []
    for compute in (long_convolution_reference, long_convolution_fft, direct):
        x, filters = (t.requires_grad_() for t in arguments((3, 4)))
        results.append(torch.autograd.grad(compute(x, filters).square().sum(), (x, filters)))
    for ours in results[:2]:
        torch.testing.assert_close(ours, results[2], rtol=1e-4, atol=1e-4)


def test_low_precision_sums_in_float32():
    x, filters = arguments((9, 14))
    for compute in (long_convolution_reference, long_convolution_fft):
        with torch.autocast('cpu', torch.bfloat16):
            ours = compute(x.bfloat16(), filters)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, direct(x.bfloat16().float(), filters).bfloat16(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ('x', 'filters', 'text'),
    [
        (torch.zeros(3, 4, 2), torch.zeros(5, 7, 2), r'x must be \(B, H, W, C\), got .*\(3, 4, 2\)'),
        (torch.zeros(1, 3, 4, 2), torch.zeros(5, 8, 2), r'filters must be .*\(5, 7, 2\), got .*\(5, 8, 2\)'),
    ],
)
def test_wrong_shapes(x, filters, text):
    with pytest.raises(ValueError, match=text):
        long_convolution(x, filters)
