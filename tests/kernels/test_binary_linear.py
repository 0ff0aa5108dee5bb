"""Without this packed signs could lose a bit at a ragged width, zeros could count as signs, or the paths of binary and
shift layers and of binary attention could disagree with their formulae."""

import pytest
import torch

from densezoo.kernels import binary_linear, explain, pack_bits, popcount, unpack_bits, unpack_signs
from densezoo.kernels.binary_linear import binary_linear_reference

WIDTHS = [1, 2, 31, 32, 33, 64, 100]


def case(K, dtype=torch.float32):
    """Inputs and weights, some of them exactly zero."""
    g = torch.Generator().manual_seed(K)
    x, w = torch.randn(2, 5, K, generator=g), torch.randn(7, K, generator=g)
    x[x.abs() < 0.3] = 0
    w[w.abs() < 0.2] = 0
    return x.to(dtype), w, torch.rand(7, generator=g), torch.randn(7, generator=g)


@pytest.mark.parametrize('K', WIDTHS)
def test_bits_round_trip(K):
    bits = torch.rand(3, 2, K, generator=torch.Generator().manual_seed(K)) < 0.5
    words = pack_bits(bits)
    assert words.dtype == torch.int32 and words.shape == (3, 2, -(-K // 32))
    assert torch.equal(unpack_bits(words, K), bits)
    assert torch.equal(unpack_signs(words, K, torch.float64), 2.0 * bits - 1)
    assert torch.equal(popcount(words).sum(-1), bits.sum(-1))
    for i in range(K):  # the layout that is documented, and that the Triton kernels rely on
        assert torch.equal((words[..., i // 32] >> (i % 32)) & 1 == 1, bits[..., i])


def test_popcount_of_extremes():
    words = torch.tensor([0, -1, 1, -(2**31), 2**31 - 1], dtype=torch.int32)
    assert popcount(words).tolist() == [0, 32, 1, 1, 31]


@pytest.mark.parametrize('K', WIDTHS)
def test_formula(K):
    """The paths of the CPU against the sum written out, XNOR and popcount included."""
    x, w, scale, bias = case(K)
    packed, present = pack_bits(w > 0), pack_bits(w != 0)
    both = pack_bits(x != 0)[:, :, None] & present
    unequal = (pack_bits(x > 0)[:, :, None] ^ packed) & both
    counted = (popcount(both) - 2 * popcount(unequal)).sum(-1).float()
    assert torch.equal(counted, x.sign() @ w.sign().T)
    for call in (binary_linear, binary_linear_reference):
        torch.testing.assert_close(call(x, packed, scale, bias, nonzero=present), counted * scale + bias)
        assert torch.equal(call(x, packed), x.sign() @ (2.0 * (w > 0) - 1).T)
        ours = call(x, packed, scale, bias, nonzero=present, input_signs=False)
        torch.testing.assert_close(ours, x @ w.sign().T * scale + bias)


def test_shapes_and_types():
    x, w, scale, bias = case(40)
    packed = pack_bits(w > 0)
    wanted = binary_linear(x, packed, scale, bias)
    assert torch.equal(binary_linear(x[1, 2], packed, scale, bias), wanted[1, 2])
    assert binary_linear(x[:, :0], packed, scale, bias).shape == (2, 0, 7)
    assert torch.equal(binary_linear(x.transpose(0, 1), packed, scale, bias), wanted.transpose(0, 1))
    half = binary_linear(x.bfloat16(), packed, scale, bias)
    assert half.dtype == torch.bfloat16 and torch.equal(half, wanted.bfloat16())  # sums are exact, rounded once
    assert binary_linear(x.double(), packed, scale, bias).dtype == torch.float64


def test_float_inputs_have_a_gradient_and_signs_have_none():
    x, w, _, _ = case(33)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(binary_linear(x, pack_bits(w > 0), input_signs=False).sum(), x)
    torch.testing.assert_close(grad[0, 0], (2.0 * (w > 0) - 1).sum(0))
    assert not binary_linear(x, pack_bits(w > 0)).requires_grad


def test_compiled_equals_eager():
    x, w, scale, bias = case(40)
    packed = pack_bits(w > 0)
    compiled = torch.compile(binary_linear, fullgraph=True, backend='aot_eager')
    assert torch.equal(compiled(x, packed, scale, bias), binary_linear(x, packed, scale, bias))


def test_exported_equals_eager():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('weight', pack_bits(case(40)[1] > 0))

        def forward(self, x):
            return binary_linear(x, self.weight)

    x = case(40)[0]
    program = torch.export.export(Layer(), (x,))
    assert torch.equal(program.module()(x), Layer()(x))
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any('int_mm' in name or 'view.dtype' in name or 'shift' in name for name in operators), operators


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'x': torch.zeros(2, 40, dtype=torch.int32)}, 'x must be floating point'),
        ({'x': torch.zeros(2, 70)}, r'weight must be int32 \(N, 3\) for 70 inputs packed 32 to a word, got'),
        ({'weight': torch.zeros(7, 2)}, 'weight must be int32 .*, got weight.dtype=torch.float32'),
        ({'scale': torch.ones(1)}, r'scale must be \(7,\), one per output, got \(1,\)'),
        ({'bias': torch.ones(8)}, r'bias must be \(7,\), one per output, got \(8,\)'),
        ({'nonzero': torch.zeros(7, 1, dtype=torch.int32)}, r'nonzero must be int32 \(7, 2\) as weight'),
        ({'backend': 'triton'}, "cannot run with backend='triton': .*use backend='torch'"),
    ],
)
def test_bad_calls(change, text):
    arguments = {'x': torch.zeros(2, 40), 'weight': torch.zeros(7, 2, dtype=torch.int32), **change}
    with pytest.raises(ValueError, match=text) as caught:
        binary_linear(**arguments)
    assert '\n' not in str(caught.value)


def test_bits_must_be_bool():
    with pytest.raises(ValueError, match=r'bits must be bool \(\.\.\., K\), got bits.dtype=torch.float32'):
        pack_bits(torch.zeros(3))


def test_a_gradient_is_refused_by_triton():
    choice = explain(binary_linear, torch.zeros(2, 40, requires_grad=True), torch.zeros(7, 2, dtype=torch.int32))
    assert choice.backend == 'torch' and 'for inference alone' in choice.refusals['triton']
