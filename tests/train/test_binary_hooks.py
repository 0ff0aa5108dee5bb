"""Without this a part could become binary at the wrong time, the best checkpoint be one of floating point, or codes
never follow the model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from densezoo.backbones import binarize, create_model
from densezoo.backbones.binary import BinaryLinear, BinaryProduct, hashes_of
from densezoo.train.hooks import BinarySchedule, RelearnCodes


def model():
    return binarize(create_model('deit_tiny_patch16_224', depth=1, dim=24, num_heads=3), 'bivit')


def active(model):
    layers = {m.part: m.active for m in model.modules() if isinstance(m, BinaryLinear)}
    (product,) = (m for m in model.modules() if isinstance(m, BinaryProduct))
    assert product.active == layers['attention']
    return layers['attention'], layers['mlp']


@pytest.mark.parametrize('start', [0, 35, 70])  # a resumed run starts anywhere
def test_parts_take_their_turns(start):
    runner = SimpleNamespace(model=model(), iter=start, max_iters=100)
    hook = BinarySchedule(attention=0.2, mlp=0.5)
    hook.before_train(runner)
    for iteration in range(start, 100):
        runner.iter = iteration
        hook.before_train_iter(runner, 0)
        assert active(runner.model) == (iteration >= 20, iteration >= 50)
        if iteration % 10 == 9:
            hook.before_val(runner)
            assert active(runner.model) == (True, True)
            hook.after_val(runner)
            assert active(runner.model) == (iteration >= 20, iteration >= 50)
    hook.after_train(runner)
    assert active(runner.model) == (True, True)


def test_scales_restart_when_a_part_takes_its_turn_and_not_when_a_run_goes_on():
    runner = SimpleNamespace(model=model(), iter=49, max_iters=100)
    hook = BinarySchedule(mlp=0.5)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    layer = runner.model.blocks[0].mlp.fc1
    with torch.no_grad():
        layer.scaling_factor.fill_(7.0)
    runner.iter = 50
    hook.before_train_iter(runner, 0)
    torch.testing.assert_close(layer.scale(), layer.weight.abs().mean(1))
    with torch.no_grad():
        layer.scaling_factor.fill_(7.0)
    runner.iter, resumed = 51, BinarySchedule(mlp=0.5)
    resumed.before_train(runner)
    resumed.before_train_iter(runner, 0)
    assert (layer.scale() == 7).all()


def test_codes_are_learned_anew():
    backbone = binarize(
        create_model('pvt_v2_b0', depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_heads=1), 'ecoformer', iterations=1
    )
    for functions in hashes_of(backbone):
        functions.trained.fill_(True)
    runner = SimpleNamespace(model=backbone, iter=0, max_iters=100)
    hook, forgotten = RelearnCodes(interval=20, until=0.5), []
    for runner.iter in range(100):
        hook.before_train_iter(runner, 0)
        if not hashes_of(backbone)[0].trained:
            forgotten.append(runner.iter)
            for functions in hashes_of(backbone):
                functions.trained.fill_(True)
    assert forgotten == [20, 40]


def test_errors():
    with pytest.raises(ValueError, match=r'fractions of the run from 0 to below 1, got attention=0\.0, mlp=1\.0'):
        BinarySchedule(mlp=1.0)
    with pytest.raises(ValueError, match='interval must be positive'):
        RelearnCodes(interval=0)
    with pytest.raises(ValueError, match='BinarySchedule needs a backbone binarized by "bivit"'):
        BinarySchedule().before_train(SimpleNamespace(model=nn.Linear(2, 2)))
