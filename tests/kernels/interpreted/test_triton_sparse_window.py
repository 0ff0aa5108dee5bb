"""Without this the Triton kernels for sparse windows could read past a window, or lose a gradient of a shared token."""

import pytest
import torch

from densezoo.kernels import Windows, build_windows, rotated_sets, sparse_window_attention


def run(backend, tensors, *arguments, **options):
    given = [None if t is None else t.detach().requires_grad_() for t in tensors]
    q, k, v, bias = given
    out = sparse_window_attention(q, k, v, *arguments, bias=bias, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    leaves = [t for t in given if t is not None]
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves, materialize_grads=True)]


def compare(tensors, *arguments, tolerance=1e-5, **options):
    ours = run('triton', tensors, *arguments, **options)
    expected = run('torch', [None if t is None else t.double() for t in tensors], *arguments, **options)
    for a, b in zip(ours, expected, strict=True):
        scale = b.abs().max().clamp(1).item() if b.numel() else 1
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)
    assert ours[0].dtype == tensors[0].dtype


def tokens(count, heads=2, width=5, dtype=torch.float32, places=0):
    g = torch.Generator().manual_seed(0)
    bias = torch.randn(heads, places, places, generator=g) if places else None
    return [*(torch.randn(count, heads, width, generator=g).to(dtype) for _ in range(3)), bias]


@pytest.mark.parametrize(('counts', 'width'), [([], 4), ([0, 3, 0, 70, 1], 5), ([16, 17], 128)])
def test_windows_of_any_length(counts, width):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    compare(tokens(int(offsets[-1]), 1, width), offsets)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_masks_with_bias(dtype):
    mask = torch.rand(1, 7, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    tolerance = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    given = tokens(int(mask.sum()), 2, 7, dtype, places=12)
    compare(given, build_windows(mask, (3, 4), (1, 2)), tolerance=tolerance)


def test_sets():
    coords = torch.stack((torch.zeros(23).long(), torch.arange(23) // 5, torch.arange(23) % 5), 1)
    compare(tokens(23), rotated_sets(coords, (3, 5), set_size=4).windows(1))


def test_windows_may_share_tokens():
    index = torch.tensor([1, 0, 2, 2, 3])
    windows = Windows(torch.tensor([0, 3, 5]), index, torch.tensor([1, 0, 2, -1, 3]), None, 3)
    compare(tokens(5), windows)


def test_other_keys_and_queries_without_any():
    offsets, key_offsets = torch.tensor([0, 2, 5, 5, 6]), torch.tensor([0, 20, 20, 22, 23])
    q, k, v, _ = tokens(23)
    compare([q[:6], k, v, None], offsets, key_offsets=key_offsets)
    out = sparse_window_attention(q[:6], k, v, offsets, key_offsets=key_offsets, backend='triton')
    assert not out[2:5].any() and out[:2].all()


def test_views_are_read_where_they_lie():
    q, k, v = torch.randn(9, 2, 3, 4).permute(2, 0, 1, 3).unbind(0)
    offsets = torch.tensor([0, 4, 9])
    ours = sparse_window_attention(q, k, v, offsets, backend='triton')
    assert torch.equal(ours, sparse_window_attention(*(t.contiguous() for t in (q, k, v)), offsets, backend='triton'))
