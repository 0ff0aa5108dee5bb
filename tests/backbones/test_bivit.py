"""Without this binarized models could drift from BiViT's modules, from the models they came from, or from what they
give one image at a time and in other runtimes."""

import copy

import probe
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densezoo.backbones import binarize, create_model, load_checkpoint
from densezoo.backbones.binary import BinaryLinear, BinaryProduct, set_binary
from densezoo.backbones.binary.residuals import ResidualEstimator
from densezoo.backbones.layers import Attention, Mlp
from densezoo.backbones.registry import model_class

RECORDED = probe.load('ops/bivit_op')
# name -> size whose windows and patches need padding, and where a shifted block meets both kinds of maps
MODELS = {'swin_tiny_patch4_window7_224': (44, 72), 'deit_tiny_patch16_224': (64, 48)}


def small(name, **overrides):
    torch.manual_seed(0)
    reduced = {**model_class(name).reduced, 'depths': (1, 2, 1, 1)} if 'swin' in name else {'depth': 2, 'dim': 48}
    model = create_model(name, num_classes=5, **{**reduced, **overrides}).eval()
    for key, parameter in model.named_parameters():
        if key.endswith('bias'):  # zeros would hide what padding holds
            nn.init.normal_(parameter, std=0.5)
    return model


def case(name):
    return next(case for case in RECORDED['cases'] if case['name'] == name)


@pytest.mark.parametrize(
    ('name', 'settings'), [('att_base', dict(scale='mean', map='step')), ('att_sab', dict(scale='learned'))]
)
def test_attention(name, settings):
    """The authors' attention between 49 tokens, here those of a map."""
    holder = nn.Sequential(Attention(dim=96, bias=True))
    layer = binarize(holder, 'bivit', parts='attention', **settings)[0]
    layer.load_state_dict({key: probe.values(f'{name}.{key}', v.shape) for key, v in layer.state_dict().items()})
    x = probe.image(5, [2, 49, 96]).requires_grad_()
    y = layer(x.view(2, 7, 7, 96)).flatten(1, 2)
    outputs = {'y': y, 'loss': y.square().mean()}
    outputs['loss'].backward()
    outputs |= {'grad_input': x.grad, **{f'grad_{name}.{key}': p.grad for key, p in layer.named_parameters()}}
    for key, stored in case(name)['outputs'].items():
        probe.compare(outputs[key], stored, relative=1e-3 if key.startswith('grad') else 1e-4)


@pytest.mark.parametrize(
    ('name', 'settings'),
    [
        ('mlp', dict(scale='mean', mlp_input='sign')),
        ('mlp32a', dict(scale='mean')),
        ('mlp_ada', {}),
    ],
)
def test_mlp(name, settings):
    holder = nn.ModuleDict({'mlp': Mlp(dim=96, ratio=2)})
    layer = binarize(holder, 'bivit', parts='mlp', **settings)['mlp']
    layer.load_state_dict({key: probe.values(f'{name}.{key}', v.shape) for key, v in layer.state_dict().items()})
    x = probe.image(5, [2, 49, 96]).requires_grad_()
    y = layer(x)
    outputs = {'y': y, 'loss': y.square().mean()}
    outputs['loss'].backward()
    outputs |= {'grad_input': x.grad, **{f'grad_{name}.{key}': p.grad for key, p in layer.named_parameters()}}
    for key, stored in case(name)['outputs'].items():
        probe.compare(outputs[key], stored, relative=1e-3 if key.startswith('grad') else 1e-4)


# ---- whole models


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('name', MODELS)
def test_with_all_parts_switched_off_it_is_the_model_it_came_from(name, features_only):
    """Weights, windows, padding, shifts and position biases are the trained model's."""
    extra = dict(window_size=2, global_blocks=(1,)) if features_only and 'deit' in name else {}
    model = small(name, features_only=features_only, **extra)
    before = copy.deepcopy(model.state_dict())
    binary = binarize(model, 'bivit', residual_rank=1)
    x = probe.image(0, [2, 3, *MODELS[name]])
    with torch.no_grad():
        binarized = binary(x)
        for part in ('attention', 'mlp'):
            set_binary(binary, part, False)
        plain, expected = binary(x), model(x)
        for ours, theirs, other in zip(*((out if features_only else [out]) for out in (plain, expected, binarized))):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert (other - theirs).abs().max() > 1e-2
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_learns_and_batches_equal_single_images(name):
    parts = ('attention', 'mlp', 'merging') if 'swin' in name else ('attention', 'mlp')
    model = binarize(small(name), 'bivit', parts=parts, residual_rank=2)
    x = probe.image(1, [2, 3, *MODELS[name]])
    logits = model(x)
    torch.testing.assert_close(logits, torch.cat([model(image[None]) for image in x]), rtol=1e-4, atol=1e-4)
    logits.square().mean().backward()
    frozen = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not frozen
    assert all(p.grad.isfinite().all() for p in model.parameters())
    linears = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert all('residual' in key or key.startswith('head') for key in linears)


@pytest.mark.parametrize('name', MODELS)
def test_weights_of_both_load(name, tmp_path):
    model = small(name)
    first = binarize(model, 'bivit')
    second = load_checkpoint(binarize(small(name, drop_path_rate=0.1), 'bivit'), model.state_dict())
    x = probe.image(2, [1, 3, *MODELS[name]])
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x))
        set_binary(first, 'mlp', False)
        for p in first.parameters():
            p.add_(0.01 * torch.randn_like(p))
        set_binary(first, 'mlp')
        torch.save(first.state_dict(), tmp_path / 'binary.pth')
        torch.testing.assert_close(load_checkpoint(second, tmp_path / 'binary.pth')(x), first(x))


def test_scales_restart_at_the_weights_trained_meanwhile():
    model = binarize(small('deit_tiny_patch16_224'), 'bivit')
    layers = {m.part: m for m in model.modules() if isinstance(m, BinaryLinear)}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(3)
    set_binary(model, 'mlp', restart=True)
    for part, layer in layers.items():
        ratio = layer.weight.abs().mean(1) / layer.scale()
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1 if part == 'mlp' else 3))


def test_residuals_by_hand():
    torch.manual_seed(0)
    estimator, x = ResidualEstimator(8, 2), torch.randn(2, 5, 8)
    products, values = estimator.terms(estimator(x))
    assert products.shape == (2, 1, 5, 5) and values.shape == (2, 1, 5, 1)
    assert not products.any() and not values.any()  # nothing is added at first
    for layer in estimator.layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    products, values = estimator.terms(estimator(x))
    q, k, p, m, v = (layer(x) for layer in estimator.layers)
    expected = q @ k.transpose(1, 2) + p @ k.transpose(1, 2) + q @ m.transpose(1, 2)
    torch.testing.assert_close(products[:, 0], expected)
    torch.testing.assert_close(values[:, 0], v)
    torch.testing.assert_close(estimator.outside(), estimator(torch.zeros(8)))


def test_fused_for_deployment_it_gives_the_same():
    from densezoo.deploy import fuse_for_deploy

    model = binarize(small('deit_small_patch16_ls', depth=1, dim=48), 'bivit')
    x = probe.image(3, [1, 3, 32, 32])
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_deploy(model)(x), model(x))


# ---- errors


@pytest.mark.parametrize(
    ('method', 'settings', 'error', 'message'),
    [
        ('bivt', {}, ValueError, "method must be one of .*got 'bivt'; did you mean bivit"),
        ('bivit', {'mlp_inptu': 'sign'}, TypeError, "no setting 'mlp_inptu'; did you mean mlp_input"),
        ('bivit', {'mlp_input': 'sing'}, ValueError, 'input must be one of elastic, float, sign'),
        ('bivit', {'parts': ('mlps',)}, ValueError, 'parts must be some of attention, mlp, merging'),
        ('bivit', {'parts': 'merging'}, ValueError, "DeiT has no linear layers for part 'merging'"),
        ('bivit', {'residual_rank': -1}, ValueError, 'residual_rank must not be negative'),
    ],
)
def test_errors(method, settings, error, message):
    with pytest.raises(error, match=message):
        binarize(small('deit_tiny_patch16_224'), method, **settings)


def test_binarizing_twice_is_refused():
    model = binarize(small('deit_tiny_patch16_224'), 'bivit')
    with pytest.raises(ValueError, match="binarized already, by 'bivit'"):
        binarize(model, 'bivit')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('poolformer_s12', 'bivit needs attention, and PoolFormer has none'),
        ('pvt_v2_b0', r'bivit has no form of SpatialReductionAttention \(stages\.0\.0\.token_mixer\)'),
    ],
)
def test_other_mixers_are_refused(name, message):
    with torch.device('meta'):
        model = create_model(name)
    with pytest.raises(ValueError, match=message):
        binarize(model, 'bivit')


def test_parts_that_are_not_there_cannot_be_switched():
    model = binarize(small('deit_tiny_patch16_224'), 'bivit', parts='attention')
    with pytest.raises(ValueError, match="no binary part 'mlp'; it has attention"):
        set_binary(model, 'mlp')


def test_inactive_product_is_attention():
    product, (q, k, v) = BinaryProduct(scale=0.3), torch.randn(3, 2, 4, 8)
    product.active = False
    torch.testing.assert_close(product(q, k, v), F.scaled_dot_product_attention(q, k, v, scale=0.3))
