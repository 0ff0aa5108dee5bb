"""Without this Activator's gated unit and its shared norms could drift from the authors' code."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model
from densezoo.backbones.activator import Activator, GatedUnit
from densezoo.backbones.layers import build_token_mixer

SMALL = {**Activator.reduced, 'num_classes': 5}


def small(**overrides):
    torch.manual_seed(0)
    return create_model('activator_cifar_patch4', **{**SMALL, **overrides}).eval()


@torch.no_grad()
@pytest.mark.parametrize(('act', 'function'), [('gelu', F.gelu), ('silu', F.silu), ('relu', F.relu)])
def test_gated_unit(act, function):
    torch.manual_seed(0)
    unit = GatedUnit(dim=8, mlp_ratio=3.0, act=act)
    unit.norm.weight.uniform_(0.5, 2)
    x = torch.randn(2, 6, 8)
    gate, value = F.linear(x, unit.proj_1.weight, unit.proj_1.bias), unit.proj_2(x)
    product = unit.norm(function(gate)) * unit.norm(value)
    torch.testing.assert_close(unit(x), unit.proj_3(product))
    assert unit.norm.normalized_shape == (24,) and unit.norm.eps == 1e-5


@torch.no_grad()
def test_patches_are_seen_alone():
    model = small()
    x = torch.randn(1, 3, 32, 32)
    moved = x.clone()
    moved[..., :4, :4] += 1
    changed = (model.forward_features(x) - model.forward_features(moved)).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [0]
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean(1))


@torch.no_grad()
def test_both_branches_share_a_norm():
    block = small().blocks[0]
    block.norm.bias.uniform_()
    x = torch.randn(2, 6, 32)
    x1 = x + block.attn(F.layer_norm(x, (32,), block.norm.weight, block.norm.bias))
    expected = x1 + block.mlp(F.layer_norm(x1, (32,), block.norm.weight, block.norm.bias))
    torch.testing.assert_close(block(x, (2, 3)), expected)
    assert small(feed_forward=False).blocks[0].mlp is None


def test_dropout_in_the_mlps():
    model = small(mlp_drop=0.5)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), small()(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_gated_units_in_another_family():
    model = create_model(
        'deit_tiny_patch16_224', depth=2, dim=32, num_heads=2, token_mixer=dict(name='glu', act='silu')
    )
    assert isinstance(model.blocks[0].attn, GatedUnit) and model(torch.randn(1, 3, 40, 40)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"act must be one of .*, got 'geglu'"):
        build_token_mixer(dict(name='glu', act='geglu'), dim=8)


@torch.no_grad()
def test_attention_in_its_place():
    model = small(token_mixer='attention', num_heads=4)
    assert model.blocks[0].attn.num_heads == 4
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 5)
