"""Without this the Triton kernels of the pooling mixer and of HiLo attention could be wrong at borders, or unfused."""

import pytest
import torch

from densezoo.kernels import explain, hilo_attention, pool_mixer


def both(call, *tensors, tolerance=1e-5):
    """Results and gradients of both backends, the reference in float64."""
    found = []
    for backend, dtype in (('triton', None), ('torch', torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        outs = call(backend, *leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        generator = torch.Generator().manual_seed(1)
        loss = sum((out.double() * torch.randn(out.shape, generator=generator)).sum() for out in outs)
        found.append([*outs, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    for ours, expected in zip(*found, strict=True):
        scale = expected.abs().max().clamp(1).item()
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * scale)
    assert found[0][0].dtype == tensors[0].dtype and found[0][0].is_contiguous()


@pytest.mark.parametrize(
    ('size', 'pool_size'), [((1, 1), 3), ((1, 5), 3), ((3, 2), 5), ((7, 6), 3), ((4, 5), 1), ((9, 20), 3)]
)
@pytest.mark.parametrize('normed', [False, True])
def test_pool_mixer(size, pool_size, normed):
    x, weight = torch.randn(2, *size, 5) + 2, torch.rand(5) + 0.5

    def call(backend, x, weight):
        norm = (weight, torch.ones_like(weight), 1e-5) if normed else None
        return pool_mixer(x, pool_size, norm=norm, backend=backend)

    both(call, x, weight)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_pool_mixer_in_half_precision(dtype):
    both(lambda backend, x: pool_mixer(x, backend=backend), torch.randn(1, 4, 5, 3).to(dtype), tolerance=0.02)


def test_pool_mixer_reads_any_layout():
    x = torch.randn(2, 3, 5, 4).permute(0, 2, 3, 1)
    assert torch.equal(pool_mixer(x, backend='triton'), pool_mixer(x.contiguous(), backend='triton'))


@pytest.mark.parametrize(('size', 'window'), [((1, 5), 2), ((5, 4), 3), ((3, 4), 1)])
@pytest.mark.parametrize('masked', [False, True])
def test_hilo(size, window, masked):
    pooled = [-(-n // window) for n in size]
    qkv, query, key_value = torch.randn(1, *size, 24), torch.randn(1, *size, 15), torch.randn(1, *pooled, 30)

    def call(backend, qkv, query, key_value, outside):
        outside = None if masked else outside
        return hilo_attention(qkv, query, key_value, window, heads=(2, 3), outside=outside, backend=backend)

    both(call, qkv, query, key_value, torch.randn(24))
    assert explain(call, 'triton', qkv, query, key_value, None).backend == 'triton'
