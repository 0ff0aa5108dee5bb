"""Learning rates per layer must be timm's, and accumulation and clipping what they say."""

from pathlib import Path

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from densezoo.backbones import create_model
from densezoo.heads import FPN, DeformableDETR, OwnClassifier, RetinaNet
from densezoo.train import Detector, ImageClassifier, LayerDecayConstructor, OptimWrapper
from densezoo.train.optim import parameter_groups

SMALL = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32))


@pytest.mark.parametrize('name', ['poolformer_s12', 'caformer_s18', 'randformer_s12'])
@pytest.mark.parametrize('layer_decay', [1.0, 0.7])
def test_groups_equal_timm(name: str, layer_decay: float) -> None:
    backbone = create_model(name, num_classes=5, **SMALL)
    task = ImageClassifier(backbone=backbone, head=OwnClassifier(num_classes=5))
    ours = {}
    for group in parameter_groups(task, lr=2.0, weight_decay=0.1, layer_decay=layer_decay):
        for parameter in group['params']:
            ours[id(parameter)] = (group['lr'], group['weight_decay'])
    exempt = set(backbone.no_weight_decay())
    theirs = {}
    for group in param_groups_layer_decay(backbone, 0.1, exempt, layer_decay=layer_decay):
        for parameter in group['params']:
            theirs[id(parameter)] = (2.0 * group['lr_scale'], group['weight_decay'])
    assert len(theirs) > 20 and ours == theirs
    assert len(set(ours.values())) > (2 if layer_decay < 1 else 1)


def test_neck_and_head_learn_at_the_full_rate() -> None:
    task = Detector(
        backbone=create_model('poolformer_s12', features_only=True, out_indices=(1, 2, 3), **SMALL),
        neck=dict(type=FPN, out_channels=16),
        head=dict(type=RetinaNet, num_classes=3),
    )
    groups = parameter_groups(task, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {name: group['lr'] for group in groups for name in group['names']}
    assert set(rates) == {name for name, _ in task.named_parameters()}
    assert {rate for name, rate in rates.items() if name.startswith(('neck', 'head'))} == {1.0}
    stem = min(rate for name, rate in rates.items() if name.startswith('backbone'))
    assert stem < 0.1 and max(rates.values()) == 1.0


def test_the_backbone_learns_at_a_fraction() -> None:
    task = Detector(
        backbone=create_model('poolformer_s12', features_only=True, out_indices=(1, 2, 3), **SMALL),
        head=dict(type=DeformableDETR, num_classes=3, channels=16, hidden=16, encoder_layers=1, decoder_layers=1),
    )
    groups = parameter_groups(task, lr=1.0, weight_decay=0.1, backbone_scale=0.1)
    rates = {name: group['lr'] for group in groups for name in group['names']}
    assert {rate for name, rate in rates.items() if name.startswith('backbone')} == {0.1}
    assert {rate for name, rate in rates.items() if name.startswith('head')} == {1.0}


def test_wrong_options_are_named() -> None:
    wrapper = dict(optimizer=dict(type='SGD', lr=1.0))
    with pytest.raises(ValueError, match=r"no option 'layer_dekay': did you mean 'layer_decay'"):
        LayerDecayConstructor(wrapper, dict(layer_dekay=0.5))
    with pytest.raises(ValueError, match='explicit lr'):
        LayerDecayConstructor(dict(optimizer=dict(type='SGD')))
    with pytest.raises(ValueError, match='layer_decay must lie in'):
        parameter_groups(nn.Linear(2, 2), lr=1.0, layer_decay=1.5)
    with pytest.raises(ValueError, match=r'needs a backbone with group_matcher\(\), Linear has none'):
        parameter_groups(nn.Linear(2, 2), lr=1.0, layer_decay=0.5)
    with pytest.raises(ValueError, match='amp must be one of'):
        OptimWrapper(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0), amp='half')


def test_accumulated_small_batches_equal_one_large_batch() -> None:
    torch.manual_seed(0)
    inputs, ends = torch.randn(8, 4), []
    for parts in (1, 4):
        torch.manual_seed(1)
        layer = nn.Linear(4, 1)
        wrapper = OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), accumulative_counts=parts)
        wrapper.initialize_count_status(layer, 0, 2 * parts)
        for _ in range(2):
            for part in inputs.chunk(parts):
                wrapper.update_params(layer(part).pow(2).mean())
        ends.append(layer.weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])


def test_clipping_bounds_the_step_and_reports_the_norm() -> None:
    layer = nn.Linear(4, 1, bias=False)
    wrapper = OptimWrapper(torch.optim.SGD(layer.parameters(), lr=1.0), clip_grad=dict(max_norm=0.5))
    before = layer.weight.detach().clone()
    wrapper.update_params((layer(torch.ones(2, 4)) * 100).sum())
    torch.testing.assert_close((layer.weight - before).norm(), torch.tensor(0.5))
    assert isinstance(wrapper.grad_norm, torch.Tensor) and abs(float(wrapper.grad_norm) - 400) < 1e-3


def test_bf16_autocast_on_the_cpu() -> None:
    layer = nn.Linear(4, 1)
    wrapper = OptimWrapper(torch.optim.SGD(layer.parameters(), lr=1.0), amp='bf16')
    with wrapper.optim_context(layer):
        assert layer(torch.zeros(1, 4)).dtype == torch.bfloat16
    assert layer(torch.zeros(1, 4)).dtype == torch.float32


def test_config_reaches_the_optimizer(config_file: Path) -> None:
    from densezoo.train import build_runner, load_config

    runner = build_runner(load_config(config_file), work_dir=config_file.parent / 'run')
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert isinstance(wrapper, OptimWrapper)
    rates = sorted({group['lr'] for group in wrapper.param_groups if 'lr_scale' in group})
    assert rates[-1] == 5e-3 and len(rates) >= 5
    assert {group['weight_decay'] for group in wrapper.param_groups if 'lr_scale' in group} == {0.0, 0.05}
