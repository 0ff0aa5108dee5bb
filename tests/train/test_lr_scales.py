"""Without this a backbone's own learning rates (LIT's offsets) could be lost on the way to the optimizer."""

import pytest
from torch import nn

from densezoo.backbones import create_model
from densezoo.train.optim import learning_rate_scales, parameter_groups

SMALL = {'depths': (1, 1, 1, 1), 'dims': (32, 64, 96, 128), 'num_heads': (1, 2, 3, 4), 'features_only': True}


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = create_model('litv2_s', **SMALL)
        self.head = nn.Linear(4, 4)


@pytest.mark.parametrize('layer_decay', [1.0, 0.5])
def test_offsets_learn_slower(layer_decay):
    task = Task()
    assert learning_rate_scales(task) == {'backbone.downsample_layers.*.conv_offset.weight': 0.01}
    groups = parameter_groups(task, lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    rate = {name: group['lr'] for group in groups for name in group['names']}
    assert rate.keys() == {name for name, _ in task.named_parameters()}
    slow = [name for name in rate if name.endswith('conv_offset.weight')]
    assert len(slow) == 3
    for name in slow:
        beside = name.replace('conv_offset.weight', 'weight')
        assert rate[name] == pytest.approx(0.01 * rate[beside])
        assert rate[name.replace('weight', 'bias')] == rate[beside]  # as the authors' optimizers do
    decay = {name: group['weight_decay'] for group in groups for name in group['names']}
    assert all(decay[name] == 0.05 for name in slow)
    assert rate['head.weight'] == 0.1


def test_a_bare_backbone_and_one_without_scales():
    model = create_model('lit_ti', **{**SMALL, 'img_size': 64})
    rates = {name: group['lr_scale'] for group in parameter_groups(model, lr=1.0) for name in group['names']}
    assert {name for name, rate in rates.items() if rate != 1} == {
        f'downsample_layers.{s}.0.dconv.conv_offset.weight' for s in (1, 2, 3)
    }
    plain = create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert {group['lr_scale'] for group in parameter_groups(plain, lr=1.0)} == {1.0}
