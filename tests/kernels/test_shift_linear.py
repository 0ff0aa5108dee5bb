"""Without this packed powers of two could lose a code at a ragged width, or differ from integer shifts and adds."""

import pytest
import torch

from densezoo.kernels import fixed_point, pack_shift_sums, pack_shifts, shift_linear, unpack_shifts
from densezoo.kernels.shift_linear import DEEPEST, PER_WORD


def weights(K, bits):
    g = torch.Generator().manual_seed(K)
    depth = torch.randint(0, min(DEEPEST[bits], 20) + 1, (9, K), generator=g)
    return depth, torch.randint(-1, 2, (9, K), generator=g)


@pytest.mark.parametrize('bits', [5, 8])
@pytest.mark.parametrize('K', [1, 4, 5, 6, 7, 33])
def test_codes_round_trip(K, bits):
    depth, sign = weights(K, bits)
    packed = pack_shifts(depth, sign, bits=bits)
    assert packed.dtype == torch.int32 and packed.shape == (9, -(-K // PER_WORD[bits]))
    assert torch.equal(unpack_shifts(packed, K, torch.float64, bits=bits), sign * 2.0 ** -depth.double())


@pytest.mark.parametrize('bits', [5, 8])
def test_every_code(bits):
    depth = torch.arange(DEEPEST[bits] + 1).repeat(3)[None]
    sign = torch.tensor([[1, -1, 0]]).repeat_interleave(DEEPEST[bits] + 1, 1)
    packed = pack_shifts(depth, sign, bits=bits)
    assert torch.equal(unpack_shifts(packed, depth.shape[1], torch.float64, bits=bits), sign * 2.0 ** -depth.double())


def test_shifts_and_adds_of_integers():
    """No multiplication at all: the same numbers from shifted integers, what is shifted out kept in 14 more bits."""
    depth, sign = weights(50, 5)
    g = torch.Generator().manual_seed(1)
    x, bias = 20 * torch.randn(3, 50, generator=g), torch.randn(9, generator=g)
    integers = (x.double() * 2**16).floor().long()
    shifted = (integers[:, None] << 14) >> depth
    total = torch.where(sign > 0, shifted, torch.where(sign < 0, -shifted, 0)).sum(-1)
    total += ((bias.double() * 2**16).floor().long() << 14)[None]
    ours = shift_linear(x.double(), pack_shifts(depth, sign), bias.double())
    torch.testing.assert_close(ours, total.double() / 2**30, rtol=0, atol=1e-9)
    torch.testing.assert_close(shift_linear(x, pack_shifts(depth, sign), bias), ours.float(), rtol=0, atol=1e-4)


def sums(K):
    g = torch.Generator().manual_seed(K)
    first, second = torch.randint(0, 4, (2, 9, K), generator=g)
    return first, second, torch.randint(-1, 2, (9, K), generator=g)


@pytest.mark.parametrize('K', [1, 6, 7, 33])
def test_sums_round_trip(K):
    first, second, sign = sums(K)
    packed = pack_shift_sums(first, second, sign)
    assert packed.dtype == torch.int32 and packed.shape == (9, -(-K // 6))
    values = torch.tensor([0, 1, 1 / 4, 1 / 16])[first] + torch.tensor([0, 1 / 2, 1 / 8, 1 / 32])[second]
    assert torch.equal(unpack_shifts(packed, K, torch.float32, terms=2), sign * values)


def test_sums_are_two_shifts_and_an_addition():
    first, second, sign = sums(50)
    g = torch.Generator().manual_seed(1)
    x, bias = 20 * torch.randn(3, 50, generator=g), torch.randn(9, generator=g)
    integers = (x.double() * 2**16).floor().long()[:, None] << 5
    one = torch.where(first > 0, integers >> (2 * first - 2).clamp(min=0), 0)
    other = torch.where(second > 0, integers >> (2 * second - 1).clamp(min=0), 0)
    total = ((one + other) * sign).sum(-1) + ((bias.double() * 2**16).floor().long() << 5)
    ours = shift_linear(x.double(), pack_shift_sums(first, second, sign), bias.double(), terms=2)
    torch.testing.assert_close(ours, total.double() / 2**21, rtol=0, atol=1e-9)


def test_fixed_point():
    x = torch.tensor([1.5 * 2**-16, -0.5 * 2**-16, 4e4, -4e4, 0.25])
    assert fixed_point(x).tolist() == [2**-16, -(2**-16), 2**15 - 1, -(2**15), 0.25]


def test_shapes_and_types():
    depth, sign = weights(20, 5)
    packed, x = pack_shifts(depth, sign), torch.randn(2, 3, 20)
    wanted = shift_linear(x, packed)
    torch.testing.assert_close(shift_linear(x[1, 2], packed), wanted[1, 2])
    assert shift_linear(x[:, :0], packed).shape == (2, 0, 9)
    half = shift_linear(x.half(), packed)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), wanted, rtol=0, atol=0.02)
    biased = shift_linear(x.half(), packed, torch.full((9,), 3.0, dtype=torch.float16))
    torch.testing.assert_close(biased.float(), wanted + 3, rtol=0, atol=0.02)


@pytest.mark.parametrize('terms', [1, 2])
def test_exported_equals_eager(terms):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('weight', pack_shifts(*weights(20, 5)) if terms == 1 else pack_shift_sums(*sums(20)))

        def forward(self, x):
            return shift_linear(x, self.weight, terms=terms)

    x = torch.randn(2, 20)
    program = torch.export.export(Layer(), (x,))
    torch.testing.assert_close(program.module()(x), Layer()(x))
    assert not any('view.dtype' in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'bits': 4}, 'bits must be 5 or 8, got bits=4'),
        ({'depth': torch.zeros(3)}, r'depth and sign must be \(N, K\) and of one shape'),
        ({'depth': torch.full((2, 3), 15.0)}, 'depth must be from 0 to 14 for 5 bits, got 15 to 15'),
        ({'depth': torch.full((2, 3), 0.5)}, 'depth must hold whole numbers and sign -1, 0 or 1'),
        ({'sign': torch.full((2, 3), 2.0)}, 'depth must hold whole numbers and sign -1, 0 or 1'),
    ],
)
def test_what_cannot_be_packed(change, text):
    with pytest.raises(ValueError, match=text):
        pack_shifts(**{'depth': torch.zeros(2, 3), 'sign': torch.ones(2, 3), **change})


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'first': torch.zeros(3)}, r'first, second and sign must be \(N, K\) and of one shape, got \(3,\), \(2, 3\)'),
        ({'second': torch.full((2, 3), 4)}, 'first and second must hold 0, 1, 2 or 3 and sign -1, 0 or 1'),
        ({'first': torch.full((2, 3), 0.5)}, 'first and second must hold 0, 1, 2 or 3'),
        ({'sign': torch.full((2, 3), 2)}, 'and sign -1, 0 or 1'),
    ],
)
def test_what_is_no_sum(change, text):
    with pytest.raises(ValueError, match=text):
        pack_shift_sums(**{'first': torch.zeros(2, 3), 'second': torch.ones(2, 3), 'sign': torch.ones(2, 3), **change})


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'x': torch.zeros(2, 20, dtype=torch.int32)}, 'x must be floating point'),
        ({'x': torch.zeros(2, 30)}, r'weight must be int32 \(N, 5\) for 30 inputs of 5 bits, got'),
        ({'bits': 8}, r'weight must be int32 \(N, 5\) for 20 inputs of 8 bits, got'),
        ({'bits': 8, 'terms': 2}, 'terms must be 1, or 2 with 5 bits, got terms=2, bits=8'),
        ({'terms': 3}, 'terms must be 1, or 2 with 5 bits, got terms=3, bits=5'),
        ({'bias': torch.ones(8)}, r'bias must be \(7,\), one per output'),
        ({'backend': 'triton'}, "cannot run with backend='triton': .*use backend='torch'"),
    ],
)
def test_bad_calls(change, text):
    with pytest.raises(ValueError, match=text):
        shift_linear(**{'x': torch.zeros(2, 20), 'weight': torch.zeros(7, 4, dtype=torch.int32), **change})
