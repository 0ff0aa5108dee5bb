"""Without this an exported program could be fixed to the example's sizes, change the model, or compute something else.
That every backbone exports with dynamic batch and sizes is in tests/backbones/test_contract.py."""

import pytest
import torch
from torch import nn

from densezoo.backbones import create_model
from densezoo.deploy import export_program

SMALL = {'depths': (1, 1, 1, 1), 'dims': (16, 16, 32, 32)}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_model('poolformer_s12', features_only=True, drop_path_rate=0.5, **SMALL)


def agree(program, model, x):
    with torch.no_grad():
        for ours, expected in zip(program.module()(x), model.eval()(x), strict=True):
            torch.testing.assert_close(ours, expected)


def test_static_takes_the_example_alone(model):
    program = export_program(model, torch.randn(1, 3, 32, 40), dynamic_batch=False)
    agree(program, model, torch.randn(1, 3, 32, 40))
    for shape in ((2, 3, 32, 40), (1, 3, 40, 40)):
        with pytest.raises((AssertionError, RuntimeError)):
            program.module()(torch.randn(shape))


def test_batch_alone(model):
    program = export_program(model, torch.randn(1, 3, 32, 40))
    for batch in (1, 2, 5):
        agree(program, model, torch.randn(batch, 3, 32, 40))


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.stages[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    program = export_program(model, torch.randn(2, 3, 64, 64))
    assert before == {name: module.training for name, module in model.named_modules()}
    agree(program, model, torch.randn(3, 3, 64, 64))  # drop-path is off in the program


class TwoInputs(nn.Module):
    """Stands for a task whose head needs the image too."""

    def forward(self, image, factor):
        return [image * factor[:, None, None, None]]


def test_several_inputs_share_the_batch():
    program = export_program(TwoInputs(), (torch.randn(1, 3, 8, 8), torch.randn(1)))
    x, factor = torch.randn(4, 3, 8, 8), torch.randn(4)
    torch.testing.assert_close(program.module()(x, factor), TwoInputs()(x, factor))


@pytest.mark.parametrize(
    ('example', 'options', 'text'),
    [
        (torch.randn(3, 64, 64), {}, r'the first example must be images \(B, C, H, W\), got \[\(3, 64, 64\)\]'),
        ((), {}, 'the first example must be images'),
        (torch.randn(1, 3, 32, 64), {'dynamic_size': True}, 'the example must be at least 33 pixels'),
    ],
)
def test_bad_examples(model, example, options, text):
    with pytest.raises(ValueError, match=text):
        export_program(model, example, **options)


def test_an_example_of_one_window():
    multipole = ('pool', 'pool', 'pool', {'name': 'multipole', 'levels': 2, 'window_size': 4})
    model = create_model('poolformer_s12', features_only=True, depths=(1,) * 4, dims=(32,) * 4, mixers=multipole).eval()
    text = r'PoolFormer does not export for all sizes from 33 on.* larger example \(got \(2, 3, 160, 160\)\)'
    with pytest.raises(ValueError, match=text) as caught:
        export_program(model, torch.randn(2, 3, 160, 160), dynamic_size=True)
    assert '\n' not in str(caught.value)
    program = export_program(model, torch.randn(2, 3, 288, 288), dynamic_size=True)
    assert program.module()(torch.randn(1, 3, 300, 333))[-1].shape[2:] == (10, 11)


def test_models_of_one_size_say_why():
    fixed = create_model('randformer_s12', img_size=64, **SMALL)
    with pytest.raises(ValueError, match=r'RandFormer takes \(64, 64\) alone: its random matrices'):
        export_program(fixed, torch.randn(1, 3, 64, 64), dynamic_size=True)
    assert export_program(fixed, torch.randn(1, 3, 64, 64)).module()(torch.randn(3, 3, 64, 64)).shape == (3, 1000)
