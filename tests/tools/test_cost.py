"""Without this the cost report could count a product twice, miss that operands are signs, or price what is free."""

import json

import pytest
import torch
from torch import nn

from densezoo.backbones import binarize, create_model, pack
from densezoo.backbones.binary import BinaryLinear, BinaryProduct, ShiftLinear, ShiftSumLinear
from densezoo.tools.benchmark import main
from densezoo.tools.benchmarks import binary
from densezoo.tools.benchmarks.cost import DRAM, ENERGY, cost, kind

X = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))


def counts(module):
    row = cost(module.eval(), X)
    return (row.bit_operations, row.shifts, row.integer_additions, row.additions, row.multiplications)


def test_layers():
    """Ten rows, 40 inputs, 7 outputs: 2,800 products; scales and biases are one operation per output."""
    torch.manual_seed(0)
    assert counts(nn.Linear(40, 7)) == (0, 0, 0, 2800 + 70, 2800)
    assert cost(nn.GELU(), X).special == cost(nn.GELU(), X).additions == X.numel()
    assert counts(nn.Linear(40, 7, bias=False)) == (0, 0, 0, 2800, 2800)
    for packed in (False, True):
        for layer, expected in (
            (BinaryLinear(40, 7, bias=False), (2800, 0, 0, 0, 70)),
            (BinaryLinear(40, 7, bias=False, input='float'), (0, 0, 0, 2800, 70)),
        ):
            found = counts(pack(layer.eval()) if packed else layer)
            # training takes off the mean of each row, a packed layer has that behind it
            assert found == (expected if packed else (*expected[:3], expected[3] + 2 * 280, expected[4]))
    for layer in (ShiftLinear(40, 7, bias=False), pack(ShiftLinear(40, 7, bias=False).eval())):
        found = counts(layer)
        assert found[:3] == (0, 2800, 2800)
    packed = pack(ShiftSumLinear(40, 7, bias=False).eval())
    for layer in (ShiftSumLinear(40, 7, bias=False), ShiftSumLinear(40, 7, bias=False, form='apot'), packed):
        assert counts(layer)[:3] == (0, 2 * 2800, 2 * 2800)
    row, plain = cost(packed, X), cost(pack(ShiftLinear(40, 7, bias=False).eval()), X)
    assert row.multiplications == plain.multiplications + 70  # the scale
    assert row.moved_bytes == plain.moved_bytes == (32 * 400 + 5 * 280 + 32 * 70) // 8


def test_convolutions_and_attention():
    row = cost(nn.Conv2d(8, 4, 3, groups=2, bias=False), torch.randn(1, 8, 6, 5))
    assert row.multiplications == row.additions == 4 * 4 * 3 * 4 * 9  # outputs times inputs of a group
    assert row.moved_bytes == 4 * (8 * 6 * 5 + 4 * 4 * 9 + 4 * 4 * 3) and row.weight_bytes == 4 * 4 * 4 * 9

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = BinaryProduct(scale=1.0)

        def forward(self, x):
            return self.product(x, x, x)

    assert cost(Product(), X[None]).bit_operations == 2 * (2 * 5 * 5 * 40)


def test_kinds():
    assert kind(torch.tensor([-1.0, 0, 1])) == kind(torch.ones(3, dtype=torch.int8)) == 'signs'
    assert kind(torch.tensor([0.5, -0.25, 0, 2**-14])) == 'powers'
    assert kind(torch.tensor([0.5, 0.75])) == kind(torch.tensor([-1.5, 0, 1.0])) == 'sums'
    assert kind(torch.tensor([1 + 2**-15])) == 'sums' and kind(torch.tensor([1 + 2**-16])) == 'numbers'
    for numbers in ([0.5, 0.875], [2.0, 1], [2.5, 1], [torch.inf, 1], [torch.nan, 1], []):
        assert kind(torch.tensor(numbers)) == 'numbers'


def test_energy_and_weights():
    row = cost(pack(BinaryLinear(64, 32, bias=False).eval()), torch.randn(10, 64))
    assert row.weight_bytes == 64 * 32 / 8 + 4 * 32
    total = row.bit_operations * 0.2 / 32 + row.additions * 0.9 + row.multiplications * 3.7
    assert row.compute_energy == pytest.approx(total / 1e6)
    assert row.memory_energy == pytest.approx(row.moved_bytes * 160 / 1e6)
    assert DRAM == 160 and ENERGY['shifts'] < ENERGY['integer_additions'] * 2


def test_packed_and_simulated_models_cost_the_same():
    torch.manual_seed(0)
    model = binarize(create_model('deit_tiny_patch16_224', depth=1, dim=48, num_classes=3), 'bivit').eval()
    x = torch.randn(1, 3, 64, 64)
    simulated, packed = cost(model, x), cost(pack(model), x)
    assert simulated.bit_operations == packed.bit_operations > 0
    assert packed.additions < simulated.additions and packed.weight_bytes < 0.7 * simulated.weight_bytes


def test_command_line(capsys):
    assert main(['--json', '--cost', 'deit_tiny_patch16_224', '--methods', 'bivit', '--size', '64']) == 0
    plain, bivit = json.loads(capsys.readouterr().out)
    assert bivit['name'] == 'deit_tiny_patch16_224, bivit' and bivit['bit_operations'] > 0
    assert bivit['compute_energy'] < plain['compute_energy'] / 3 and bivit['weight_bytes'] < plain['weight_bytes'] / 8
    assert main(['cost', 'deit_tiny_patch16_224', '--size', '32']) == 0
    assert '| deit_tiny_patch16_224, bivit |' in capsys.readouterr().out
    assert main(['cost', 'deit_tiny_patch16_224', '--methods', 'bivitt']) == 1
    assert 'method must be one of' in capsys.readouterr().err


def test_binary_benchmark_prints_both_sides(capsys, monkeypatch):
    monkeypatch.setattr(binary, 'INPUTS', 64)
    monkeypatch.setattr(binary, 'OUTPUTS', 30)
    assert main(['--json', 'binary', '--tokens', '3', '--repeats', '1']) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row['memory'] for row in rows] == [32, 32, pytest.approx(64 / 11)]
    assert all(row['ours'] > 0 and row['peer'] > 0 and row['peer_name'] == 'float32' for row in rows)
    assert main(['binary', '--tokens', '2', '--repeats', '1']) == 0
    assert '| shift 2x64x30 |' in capsys.readouterr().out
