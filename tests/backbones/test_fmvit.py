"""Without this FMViT could deploy as another network than it trained as, or with more than convolutions in it."""

import copy

import pytest
import torch
from torch import nn

from densezoo.backbones import create_model
from densezoo.backbones.fmvit import FMViT
from densezoo.backbones.layers.reparam import RepConv, merge_branches
from densezoo.deploy import fuse_for_deploy

BRANCHES = [
    (8, 8, ((1, 1),), 1),
    (8, 12, ((1, 1), (1, 2), (1, 4)), 1),
    (8, 8, ((1, 2), (1, 4), (1, 8)), 1),
    (6, 6, ((5, 6), (3, 6), (1, 6)), 1),
    (4, 8, ((3, 1), (1, 1)), 2),
    (4, 8, ((3, 2), (3, 4), (1, 2)), 2),
]


def trained(module, x):
    """Norms get statistics of their own inputs and random factors."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.bias.uniform_(-0.5, 0.5, generator=generator)
            norm.momentum = None
    module.train()
    for _ in range(2):
        module(x)
    return module.eval()


@pytest.mark.parametrize(('in_dim', 'dim', 'branches', 'stride'), BRANCHES)
def test_branches_are_one_convolution(in_dim, dim, branches, stride):
    torch.manual_seed(0)
    x = torch.randn(2, in_dim, 7, 9) + 1
    layer = trained(RepConv(in_dim, dim, branches=branches, stride=stride), x)
    separate = layer(x)  # gradients are wanted: the branches run as they are
    merged = layer.for_deploy()
    assert type(merged) is nn.Conv2d and merged.groups == branches[0][1]
    assert (layer.skip is not None) == (in_dim == dim and stride == 1)
    with torch.no_grad():
        assert separate.shape[2:] == (-(-7 // stride), -(-9 // stride))
        torch.testing.assert_close(merged(x), separate, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer(x), separate, rtol=0, atol=1e-5)


@pytest.mark.parametrize('branches', [((1, 1), (3, 1)), ((3, 2), (1, 1)), ((2, 1),), ((1, 3),)])
def test_branches_that_do_not_fit_into_the_first(branches):
    with pytest.raises(ValueError, match=r'branches must be .* the first one widest, got branches='):
        RepConv(8, 8, branches=branches)
    with pytest.raises(ValueError, match=r'identity=True needs equal channels and stride 1, got in_dim=4, dim=8'):
        RepConv(4, 8, identity=True)


@pytest.mark.parametrize('features_only', [False, True])
@torch.no_grad()
def test_reparameterized_outputs_are_equal(features_only):
    torch.manual_seed(0)
    model = create_model('fmvit_t', features_only=features_only, num_classes=7, **FMViT.reduced)
    x = torch.randn(2, 3, 96, 128)
    model = trained(model, x)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    for deployed in (model.reparameterize(), fuse_for_deploy(model)):
        ours = deployed(x)
        for a, b in zip(ours, expected, strict=True) if features_only else [(ours, expected)]:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))
        kinds = {type(module) for module in deployed.modules() if not list(module.children())}
        assert kinds <= {nn.Conv2d, nn.Identity, type(deployed.stages[0][0].drop_path), *head_kinds(deployed)}
        assert sum(p.numel() for p in deployed.parameters()) < sum(p.numel() for p in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def head_kinds(model):
    return () if model.features_only else (type(model.head),)


def test_merging_leaves_other_modules_alone():
    model = nn.Sequential(RepConv(4, 4, branches=[(3, 4), (1, 4)]), nn.ReLU(), nn.BatchNorm2d(4))
    merged = merge_branches(model)
    assert [type(part) for part in merged] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    assert isinstance(model[0], RepConv) and model.training and not merged.training


# millions of parameters in training and deployed, and billions of multiply-adds deployed: ours, there are no others
@pytest.mark.parametrize(
    ('name', 'params', 'deployed'),
    [
        ('fmvit_t', 6.0, 4.5),
        ('fmvit_s', 10.0, 7.5),
        ('fmvit_m', 16.1, 12.0),
        ('fmvit_b', 28.0, 20.7),
        ('fmvit_l', 49.8, 36.7),
    ],
)
def test_sizes(name, params, deployed):
    with torch.device('meta'):
        model = create_model(name)
        convs = [m for m in model.modules() if isinstance(m, RepConv)]
        saved = sum(sum(p.numel() for p in m.parameters()) for m in convs)
        merged = sum(m.convs[0].weight.numel() + m.convs[0].out_channels for m in convs)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.05)
    total = sum(p.numel() for p in model.parameters()) - saved + merged
    assert total / 1e6 == pytest.approx(deployed, abs=0.06)


def test_where_frequencies_are_mixed():
    with torch.device('meta'):
        model = create_model('fmvit_t')
    kinds = [[type(block.mixer).__name__ for block in stage] for stage in model.stages]
    conv, mix = 'ConvFusion', 'FrequencyMixer'
    assert kinds == [[conv] * 2, [conv, mix], [conv, conv, mix] * 2, [conv, mix]]


@pytest.mark.parametrize(
    ('overrides', 'text'),
    [
        ({'num_heads': 5}, 'num_heads must divide the 32 channels of the low band, got num_heads=5'),
        ({'low_ratio': 1.0}, r'low_ratio must be between 0 and 1, got low_ratio=1\.0'),
        ({'reductions': (1, 2)}, r'reductions must be one value or 4'),
    ],
)
def test_arguments_that_cannot_be_built(overrides, text):
    with pytest.raises(ValueError, match=text), torch.device('meta'):
        create_model('fmvit_t', **overrides)
