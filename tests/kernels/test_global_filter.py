"""Without this the global filter could be wrong at odd sizes, differ between its two forms, or export an FFT."""

import math
import sys

import pytest
import torch

from densezoo.deploy import export_program
from densezoo.kernels import global_filter, resample_filter, use
from densezoo.kernels.global_filter import can_run_fft, global_filter_fft, global_filter_reference

SIZES = [(1, 1), (1, 4), (5, 1), (2, 2), (3, 4), (7, 7), (6, 9), (14, 14), (31, 20)]


def filter_of(height, width, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(height, width // 2 + 1, channels, 2, generator=generator)


def images(height, width, channels=3, batch=2):
    return torch.randn(batch, height, width, channels, generator=torch.Generator().manual_seed(1))


def by_hand(x, weight):
    """A circular convolution with the filter's impulse response, one offset at a time."""
    _, H, W, _ = x.shape
    impulse = torch.zeros(H, W, x.shape[-1], dtype=torch.float64)
    for h in range(H):
        for w in range(W):
            for k in range(H):
                for m in range(W // 2 + 1):
                    angle = 2 * math.pi * (k * h / H + m * w / W)
                    real, imaginary = weight[k, m].double().unbind(-1)
                    times = 1 if m == 0 or 2 * m == W else 2
                    # frequencies 0 and W / 2 stand for themselves: their conjugates sit at row -k
                    impulse[h, w] += times * (real * math.cos(angle) - imaginary * math.sin(angle)) / (H * W)
    rolled = [x.double().roll((h, w), (1, 2)) * impulse[h, w] for h in range(H) for w in range(W)]
    return sum(rolled)


@pytest.mark.parametrize('size', [(1, 1), (1, 4), (3, 4), (4, 5)])
def test_formula(size):
    x, weight = images(*size), filter_of(*size)
    for run in (global_filter_reference, global_filter_fft):
        torch.testing.assert_close(run(x, weight).double(), by_hand(x, weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize('size', SIZES)
def test_both_forms_agree(size):
    x, weight = images(*size), filter_of(*size)
    matrices, fft = global_filter_reference(x, weight), global_filter_fft(x, weight)
    assert matrices.shape == x.shape and matrices.is_contiguous()
    torch.testing.assert_close(matrices, fft, rtol=0, atol=1e-5 * fft.abs().max().item())


def test_large_maps_stay_exact():
    x, weight = images(100, 167, batch=1), filter_of(100, 167)
    expected = global_filter_fft(x, weight)
    torch.testing.assert_close(global_filter(x, weight, backend='torch'), expected, rtol=0, atol=1e-5 * expected.max())


def test_gradients_agree():
    results = []
    for run in (global_filter_reference, global_filter_fft):
        x, weight = images(6, 9).requires_grad_(), filter_of(6, 9).requires_grad_()
        run(x, weight).square().sum().backward()
        results.append((x.grad, weight.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_choice_of_the_form(monkeypatch):
    def refuse(*arguments):
        raise AssertionError('an FFT was used')

    x, weight = images(16, 16), filter_of(16, 16)
    monkeypatch.setattr(sys.modules['densezoo.kernels.global_filter'], 'global_filter_fft', refuse)
    with pytest.raises(AssertionError, match='an FFT was used'):
        global_filter(x, weight)
    global_filter(x, weight, backend='torch')
    with use('torch'):
        global_filter(x, weight)
    assert 'small' in can_run_fft(images(14, 14)) and can_run_fft(x) is None


@pytest.mark.parametrize('dynamic', [False, True])
def test_exports_without_fft(dynamic):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(filter_of(14, 14))

        def forward(self, image):
            x = image.permute(0, 2, 3, 1)
            return global_filter(x, resample_filter(self.weight, x.shape[1], x.shape[2]))

    def image(height, width, batch=2):
        return images(height, width, batch=batch).permute(0, 3, 1, 2)

    net = Net()
    program = export_program(net, image(15, 18), dynamic_size=dynamic, min_size=4)
    assert 'fft' not in str(program.graph)
    for size in [(15, 18), (15, 18, 1), *([(20, 33), (5, 64, 1)] if dynamic else [])]:
        expected = net(image(*size)).detach()
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(program.module()(image(*size)), expected, rtol=0, atol=atol)


@pytest.mark.parametrize('backend', [None, 'torch'])
def test_precision_is_kept_under_autocast(backend):
    x, weight = images(20, 20), filter_of(20, 20)
    expected = global_filter(x, weight)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(global_filter(x, weight, backend=backend), expected, rtol=1e-5, atol=1e-5)
        half = global_filter(x.bfloat16(), weight, backend=backend)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic'])
def test_resampling(mode):
    weight = filter_of(6, 8)
    assert resample_filter(weight, 6, 8, mode) is weight
    for size in [(9, 13), (3, 4), (1, 1)]:
        out = resample_filter(weight, *size, mode)
        assert out.shape == (size[0], size[1] // 2 + 1, 3, 2)
        torch.testing.assert_close(out[0, 0], weight[0, 0])
    torch.testing.assert_close(resample_filter(weight, 9, 13, mode)[-1, -1], weight[-1, -1])
    constant = torch.full_like(weight, 0.5)
    torch.testing.assert_close(resample_filter(constant, 11, 5, mode), torch.full((11, 3, 3, 2), 0.5))


@pytest.mark.parametrize(
    ('x', 'weight', 'backend', 'text'),
    [
        (torch.zeros(2, 3, 4), filter_of(3, 4), None, r'x must be \(B, H, W, C\), got tuple\(x\.shape\)=\(2, 3, 4\)'),
        (images(4, 4), filter_of(4, 6), None, r'weight must be .* = \(4, 3, 3, 2\), got .*\(4, 4, 3, 2\)'),
        (images(4, 4), filter_of(4, 4), 'triton', "cannot run with backend='triton': .*use backend='torch'"),
    ],
)
def test_errors(x, weight, backend, text):
    with pytest.raises(ValueError, match=text):
        global_filter(x, weight, backend=backend)
