"""Without this the Triton kernels of window attention could read the wrong places, or lose a gradient."""

import pytest
import torch

from densezoo.kernels import explain, use, window_attention

# size, window, shift, pad, dilation, heads, width; ugly ones first
CASES = {
    'one row': ((1, 5), (3, 3), (1, 1), (0, 0), 1, 2, 3),
    'window larger, padding above': ((4, 3), (7, 5), (2, 4), (2, 1), 1, 1, 16),
    'ragged, padded on all sides': ((3, 9), (2, 4), (1, 2), (1, 2), 1, 1, 5),
    'dilated, shifted, padding above': ((5, 3), (3, 2), (2, 1), (1, 2), 2, 1, 4),
    'stripes of columns': ((9, 3), (9, 2), (0, 1), (0, 1), 1, 2, 8),
    'exact and shifted': ((6, 6), (3, 3), (1, 1), (0, 0), 1, 1, 32),
    'several blocks': ((8, 5), (8, 9), (3, 0), (0, 4), 1, 1, 40),
    'wide heads in blocks': ((5, 7), (5, 7), (2, 3), (0, 0), 1, 1, 128),
}
EACH = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


def arguments(case, outside, biased, cosine, dtype=torch.float32):
    (H, W), window, shift, pad, dilation, heads, width = case
    g = torch.Generator().manual_seed(0)
    N, C = window[0] * window[1], heads * width
    tensors = {
        'qkv': torch.randn(1, H, W, 3 * C, generator=g).to(dtype),
        'bias': torch.randn(heads, N, N, generator=g) if biased else None,
        'outside': torch.randn(3 * C, generator=g) if outside else None,
        'cosine': torch.rand(heads, generator=g) + 0.5 if cosine else None,
    }
    return tensors, {'window': window, 'shift': shift, 'heads': heads, 'pad': pad, 'dilation': dilation}


def run(backend, tensors, options, weight=None):
    """The result and all gradients."""
    given = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    out = window_attention(**given, **options, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if weight is None else weight
    leaves = [t for t in given.values() if t is not None]
    grads = torch.autograd.grad((out.double() * weight).sum(), leaves, materialize_grads=True)
    return [out, *grads]


def compare(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * b.abs().max().clamp(1).item())


@EACH
@pytest.mark.parametrize(
    ('outside', 'biased', 'cosine'), [(True, True, False), (False, True, True)], ids=['outside', 'cosine']
)
def test_result_and_gradients(case, outside, biased, cosine):
    tensors, options = arguments(case, outside, biased, cosine)
    expected = run('torch', {name: None if t is None else t.double() for name, t in tensors.items()}, options)
    ours = run('triton', tensors, options)
    assert ours[0].is_contiguous() and ours[0].dtype == torch.float32
    compare(ours, expected, 1e-5)


@pytest.mark.parametrize('name', ['ragged, padded on all sides', 'several blocks'])
def test_windows_share_a_program(name, monkeypatch):
    tensors, options = arguments(CASES[name], True, True, True)
    tensors['qkv'] = torch.cat((tensors['qkv'], tensors['qkv'].flip(1)))
    expected = run('torch', {name: t.double() for name, t in tensors.items()}, options)
    window_attention(**tensors, **options, backend='triton')  # imports the module
    monkeypatch.setattr('densezoo.kernels.triton_window._CHUNKS', 2)
    compare(run('triton', tensors, options), expected, 1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['ragged, padded on all sides', 'wide heads in blocks'])
def test_half_precision(name, dtype):
    tensors, options = arguments(CASES[name], True, False, True, dtype)
    expected = run('torch', {name: None if t is None else t.double() for name, t in tensors.items()}, options)
    ours = run('triton', tensors, options)
    assert ours[0].dtype == ours[1].dtype == dtype
    compare(ours, expected, 0.01 if dtype == torch.float16 else 0.05)


def test_strided_maps_are_read_where_they_lie():
    tensors, options = arguments(CASES['ragged, padded on all sides'], True, True, False)
    larger = torch.zeros(1, 9, 20, tensors['qkv'].shape[-1] + 2)
    larger[:, 2:5, 3:12, 1:-1] = tensors['qkv']
    views = [larger[:, 2:5, 3:12, 1:-1], tensors['qkv'].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)]
    expected = window_attention(**tensors, **options, backend='triton')
    for view in views:
        assert not view.is_contiguous()
        assert torch.equal(window_attention(**{**tensors, 'qkv': view}, **options, backend='triton'), expected)


def test_zero_vectors_have_no_direction():
    tensors, options = arguments(CASES['exact and shifted'], False, False, True)
    tensors['qkv'][0, 0, 0] = 0
    ours, expected = run('triton', tensors, options), run('torch', tensors, options)
    compare(ours[:1], expected[:1], 1e-5)
    assert all(t.isfinite().all() for t in ours)


def test_interpreter_runs_only_when_asked():
    tensors, options = arguments(CASES['one row'], False, False, False)
    assert explain(window_attention, **tensors, **options).backend == 'torch'
    with use('triton'):
        assert explain(window_attention, **tensors, **options).backend == 'triton'
        with pytest.raises(ValueError, match=r"backend='triton': qkv is torch.float64, and the kernels take float32"):
            window_attention(tensors['qkv'].double(), **options)
        with pytest.raises(ValueError, match='windows have 4225 positions, and the kernels take up to 4096'):
            window_attention(tensors['qkv'], 65, heads=2)
    with pytest.raises(ValueError, match='heads are 129 channels wide, and the kernels take up to 128'):
        window_attention(torch.zeros(1, 2, 2, 387), 2, heads=1, backend='triton')


def test_operator_is_registered_correctly():
    tensors, options = arguments(CASES['one row'], True, True, True)
    given = [t.requires_grad_() for t in tensors.values()]
    rest = (options['window'], options['shift'], options['heads'], 1.0, options['pad'], options['dilation'])
    window_attention(**tensors, **options, backend='triton')  # registers it
    checks = ('test_schema', 'test_faketensor', 'test_autograd_registration')
    torch.library.opcheck(torch.ops.densezoo.window_attention.default, (*given, *rest), test_utils=checks)
