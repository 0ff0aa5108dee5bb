"""Without this the way from LayerNorm to batch norm, or its merging for deployment, could drift from the authors' or
change outputs."""

import copy

import probe
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densezoo.backbones import create_model
from densezoo.backbones.layers import NORMS, LayerNorm, PRepBN, RepBN
from densezoo.backbones.layers.fold_norm import Affine, fold_into_next, fold_into_previous
from densezoo.backbones.layers.rep_norm import flatten_prepbn


def case(name, case_name):
    recorded = probe.load(name)
    found = next(case for case in recorded['cases'] if case['name'] == case_name)
    return found, flatten_prepbn(probe.golden_state(recorded)), probe.image(found['seed'], found['shape'])


def loaded(norm, state):
    missing = norm.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert {key.rpartition('.')[2] for key in missing.missing_keys} <= {
        'num_batches_tracked',
        'warm',
        'iter',
        'total_step',
    }
    return norm


@torch.no_grad()
def test_repbn_in_evaluation():
    found, state, x = case('repbn', 'eval_2x49x64')
    probe.compare(loaded(RepBN(64), state).eval()(x), found['outputs']['out'])


@torch.no_grad()
def test_repbn_in_training():
    found, state, x = case('repbn', 'train_4x49x64')
    norm = loaded(RepBN(64), state).train()
    outputs = {'out': norm(x), 'running_mean_after': norm.bn.running_mean, 'running_var_after': norm.bn.running_var}
    for name, stored in found['outputs'].items():
        probe.compare(outputs[name], stored)


@torch.no_grad()
def test_repbn_merged_into_linear():
    found, state, x = case('repbn', 'merged_into_linear')
    norm, linear = loaded(RepBN(64), state).eval(), nn.Linear(64, 32)
    linear.weight.copy_(probe.values('linear.weight', (32, 64)))
    linear.bias.copy_(probe.values('linear.bias', (32,)))
    outputs = {'linear_of_repbn': linear(norm(x))}
    assert isinstance(fold_into_next(norm, linear), nn.Identity)
    outputs |= {'weight': linear.weight, 'bias': linear.bias, 'merged_linear': linear(x)}
    assert outputs.keys() == found['outputs'].keys()
    for name, stored in found['outputs'].items():
        probe.compare(outputs[name], stored)


@pytest.mark.parametrize('found', probe.load('prepbn')['cases'], ids=lambda case: case['name'])
def test_prepbn(found):
    recorded = probe.load('prepbn')
    x = probe.image(found['seed'], found['shape'])
    norm = loaded(PRepBN(64, warm=found.get('warm_before', 0)), flatten_prepbn(probe.golden_state(recorded)))
    norm.train(found['mode'] == 'train')
    if norm.training:
        norm.iter.fill_(found['iter_before'])
        norm.total_step.fill_(found['total_step'])
    probe.compare(norm(x), found['outputs']['out'])
    if norm.training:
        norm.advance()
        assert (norm.iter, norm.warm) == (found['iter_after'], found['warm_after'])
        rested = torch.equal(norm.bn.running_mean, probe.golden_state(recorded)['norm2.bn.running_mean'])
        assert rested == (found['warm_before'] > 0)


def test_parameters():
    assert sum(p.numel() for p in RepBN(64).parameters()) == probe.load('repbn')['params']
    assert sum(p.numel() for p in PRepBN(64).parameters()) == probe.load('prepbn')['params']
    with pytest.raises(ValueError, match=r'step be positive, got warm=0, step=0'):
        PRepBN(8, step=0)


def test_keys_of_nested_norms():
    theirs = {
        'norm.norm2.alpha': 1, 'norm.norm2.bn.weight': 2, 'norm.norm1.weight': 3, 'norm.norm1.bias': 4,
        'blocks.0.norm1.norm1.weight': 5, 'blocks.0.norm1.norm2.alpha': 6,
        'blocks.0.norm2.norm1.weight': 7, 'blocks.0.norm2.norm2.alpha': 8, 'norm2.weight': 9, 'norm1.weight': 10,
    }  # fmt: skip
    ours = {
        'norm.alpha': 1, 'norm.bn.weight': 2, 'norm.layer_norm.weight': 3, 'norm.layer_norm.bias': 4,
        'blocks.0.norm1.layer_norm.weight': 5, 'blocks.0.norm1.alpha': 6,
        'blocks.0.norm2.layer_norm.weight': 7, 'blocks.0.norm2.alpha': 8, 'norm2.weight': 9, 'norm1.weight': 10,
    }  # fmt: skip
    assert flatten_prepbn(theirs) == ours and flatten_prepbn(ours) == ours
    alone = {'blocks.0.norm1.alpha': 1, 'blocks.0.norm2.alpha': 2, 'blocks.0.norm2.bn.weight': 3}
    assert flatten_prepbn(alone) == alone


def test_progress_and_the_share_of_layer_norm():
    norm, x = PRepBN(8).train(), torch.randn(4, 5, 8)
    plain, batch = F.layer_norm(x, (8,), eps=1e-6), F.batch_norm(x.reshape(-1, 8), None, None, training=True)
    for done, share in [(0, 1.0), (9, 1.0), (10, 1.0), (30, 0.5), (50, 0.0), (99, 0.0)]:
        norm.set_progress(done, warm=10, steps=40)
        expected = share * plain + (1 - share) * (batch.reshape(x.shape) + x)
        torch.testing.assert_close(norm(x), expected, msg=lambda text, done=done: f'{done}: {text}')
    norm.set_progress(0, warm=0, steps=0)
    torch.testing.assert_close(norm(x), batch.reshape(x.shape) + x)


def test_compiles_for_all_of_training():
    torch._dynamo.reset()
    eager = PRepBN(8, step=4).train()
    again = copy.deepcopy(eager)
    compiled = torch.compile(again, fullgraph=True, backend='aot_eager')
    for _ in range(6):
        x = torch.randn(2, 3, 4, 8)
        for norm, run in ((eager, eager), (again, compiled)):
            norm.zero_grad()
            run(x).square().sum().backward()
            norm.advance()
        assert all(p.grad is not None for p in again.parameters())
        torch.testing.assert_close([p.grad for p in again.parameters()], [p.grad for p in eager.parameters()])
        torch.testing.assert_close(dict(again.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.parametrize('name', ['repbn', 'prepbn', 'unified', 'batch'])
@torch.no_grad()
def test_folding_changes_nothing(name):
    norm, x = NORMS[name](6), torch.randn(2, 5, 7, 6)
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    norm.eval()
    for layer in (nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Conv2d(6, 4, 2, bias=False)):

        def run(y, layer=layer):
            return layer(y.permute(0, 3, 1, 2)) if isinstance(layer, nn.Conv2d) else layer(y)

        expected = run(norm(x))
        assert isinstance(fold_into_next(norm, layer), nn.Identity)
        torch.testing.assert_close(run(x), expected)
    for layer in (nn.Linear(3, 6), nn.Linear(3, 6, bias=False)):
        y = torch.randn(2, 4, 4, 3)
        expected = norm(layer(y))
        assert isinstance(fold_into_previous(layer, norm), nn.Identity)
        torch.testing.assert_close(layer(y), expected)
    padded = nn.Conv2d(6, 4, 3, padding=1)
    assert fold_into_next(norm, padded) is norm  # zeros around the map are not what the norm would make of zeros


def test_norms_that_depend_on_their_input_stay():
    norm, linear = LayerNorm(6), nn.Linear(6, 4)
    before = linear.weight.clone()
    assert fold_into_next(norm, linear) is norm and fold_into_previous(linear, norm) is norm
    assert torch.equal(linear.weight, before)


def test_any_family_can_use_it():
    model = create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), norm='prepbn', num_classes=3)
    x = torch.randn(2, 3, 64, 64)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(isinstance(m, PRepBN) for m in model.modules()) == 9
    assert model.eval()(x).shape == (2, 3) and isinstance(Affine(*model.norm.affine()), nn.Module)
