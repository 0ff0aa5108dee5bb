"""Without this a forced backend could be ignored, an exported program could hold a Triton kernel, or Triton could be
imported on machines that have no use for it."""

import subprocess
import sys

import pytest
import torch

from densezoo.kernels import explain, pool_mixer, record_choices, use, window_attention
from densezoo.kernels.dispatch import Choice, select

FREE = {'triton': None, 'torch': None}


def test_auto_restores_the_free_choice_within_a_block():
    with use('torch'):
        assert select('op', None, FREE) == 'torch'
        assert select('op', 'auto', FREE) == 'triton'
        with use('auto'):
            assert select('op', None, FREE) == 'triton'
    assert select('op', None, {'triton': 'no GPU', 'torch': None}) == 'torch'


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        ('torch', 'torch'),
        ('auto', 'triton'),
        ('', 'ValueError: DENSEZOO_KERNELS must be one of auto, triton, torch, got '),
        ('cuda', "ValueError: DENSEZOO_KERNELS must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_environment(value, expected, monkeypatch):
    monkeypatch.setattr('densezoo.kernels.dispatch._from_environment', value)
    try:
        found = select('op', None, FREE)
    except ValueError as error:
        found = f'ValueError: {error}'
    assert found.startswith(expected)
    with use('torch'):
        assert select('op', None, FREE) == 'torch'  # a block goes before the environment


def test_environment_is_read_and_triton_is_not_imported():
    code = (
        'import sys, torch\n'
        'from densezoo.kernels import window_attention\n'
        'try: window_attention(torch.zeros(1, 2, 2, 3), 2, heads=1)\n'
        'except ValueError as error: print(error)\n'
        "window_attention(torch.zeros(1, 2, 2, 3), 2, heads=1, backend='torch')\n"
        "print('imported', [name for name in sys.modules if name.startswith('densezoo.kernels.triton')])\n"
    )
    command = [sys.executable, '-P', '-c', code]
    environment = {'DENSEZOO_KERNELS': 'triton', 'PATH': ''}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (
        "window_attention cannot run with backend='triton': qkv is on cpu, and Triton needs a CUDA device"
        in result.stdout
    )
    assert 'imported []' in result.stdout


def test_exports_take_the_reference():
    class Mix(torch.nn.Module):
        def forward(self, x):
            return pool_mixer(x)

    with use('triton'):
        program = torch.export.export(Mix(), (torch.zeros(1, 4, 4, 3),))
        with pytest.raises(ValueError, match='pool_mixer cannot run'):
            Mix()(torch.zeros(1, 4, 4, 3))
    assert 'avg_pool2d' in str(program.graph) and 'densezoo' not in str(program.graph)


def test_explain_checks_and_computes_nothing():
    choice = explain(window_attention, torch.zeros(1, 4, 4, 12), 2, heads=2)
    assert choice.operation == 'window_attention' and choice.backend == 'torch'
    assert 'qkv is on cpu' in choice.refusals['triton']
    assert str(choice).startswith('window_attention: torch (not triton: qkv is on cpu')
    assert explain(window_attention, torch.zeros(1, 4, 4, 12, device='meta'), 2, heads=2).backend == 'torch'
    with pytest.raises(ValueError, match='heads must divide'):
        explain(window_attention, torch.zeros(1, 4, 4, 12), 2, heads=3)
    with pytest.raises(TypeError, match=r'is not dispatched; pass an operation of densezoo.kernels'):
        explain(torch.relu, torch.zeros(1))


def test_choices_of_a_model_are_recorded_once_each():
    x = torch.zeros(1, 4, 4, 3)
    with record_choices() as choices:
        pool_mixer(x)
        pool_mixer(x)
        window_attention(x, 2, heads=1)
    assert [choice.operation for choice in choices] == ['pool_mixer', 'window_attention']
    pool_mixer(x)
    assert len(choices) == 2 and all(isinstance(choice, Choice) for choice in choices)


def test_compiles_into_one_graph():
    def f(x):
        return window_attention(x, 2, heads=1) + pool_mixer(x[..., :1])

    x = torch.randn(1, 4, 4, 3)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend='aot_eager')(x), f(x))
