"""Without this unified normalisation could drift from the authors' in a way that only long trainings show: smoothing,
filtering, the approximate gradient, and the states they leave."""

import copy

import probe
import pytest
import torch
from torch import nn

from densezoo.backbones import create_model
from densezoo.backbones.layers import norm_factory
from densezoo.backbones.layers.unified_norm import UnifiedNorm

RECORDED = probe.load('unified_norm_op')
VALID = (15, 20, 10)  # positions of each sequence that are not padding, in the case with a mask


def norm_of(arguments):
    window = arguments.get('window_size', 4)
    norm = UnifiedNorm(
        16,
        window=window if isinstance(window, int) else tuple(window),
        warmup_iters=arguments.get('warmup_iters', 4000),
        outlier_filtration=arguments.get('outlier_filtration', False),
    )
    with torch.no_grad():
        norm.weight.copy_(probe.values('weight', [16]))
        norm.bias.copy_(probe.values('bias', [16]))
    norm.iters.fill_(arguments.get('start', 0))
    return norm.train()


@pytest.mark.parametrize('case', RECORDED['cases'], ids=lambda case: case['name'])
def test_training_evaluation_and_fusion(case):
    arguments = case['args']
    norm, outputs = norm_of(arguments), {}
    mask = torch.stack([torch.arange(20) >= n for n in VALID]) if arguments.get('pad') else None
    for i in range(arguments['nb']):
        scale = (1 + 0.3 * i) * arguments.get('scales', {}).get(str(i), 1.0)
        x = (scale * probe.image(10 + i, [3, 20, 16])).requires_grad_()
        norm.zero_grad()
        y = norm(x, mask)
        y.backward(probe.image(50 + i, [3, 20, 16]))
        step = {'y': y, 'gx': x.grad, 'gw': norm.weight.grad, 'gb': norm.bias.grad}
        step |= {'running_var': norm.running_var, 'ema_gz': norm.ema_gz}
        outputs |= {f'{name}{i + 1}': value.detach().clone() for name, value in step.items()}
    norm.eval()
    linear = nn.Linear(16, 24)
    with torch.no_grad():
        linear.weight.copy_(probe.values('fused.weight', [24, 16]))
        linear.bias.copy_(probe.values('fused.bias', [24]))
        x = probe.image(99, [2, 20, 16])
        scale, shift = norm.affine()
        fused = torch.nn.functional.linear(x, linear.weight * scale, linear.bias + linear.weight @ shift)
        outputs |= {'eval': norm(x), 'eval_then_linear': linear(norm(x)), 'fused_linear': fused}
    outputs |= {name: getattr(norm, name) for name in ('buffer_x2', 'buffer_gz', 'iters', 'skip_counter')}
    assert outputs.keys() == case['outputs'].keys()
    for name, stored in case['outputs'].items():
        if 'ints' in stored:
            assert outputs[name].tolist() == stored['ints'], name
        else:
            probe.compare(outputs[name], stored, relative=1e-5)


def test_keys_and_parameters_are_the_authors():
    norm = UnifiedNorm(16)
    assert {key: list(value.shape) for key, value in norm.state_dict().items()} == RECORDED['state_dict']
    assert sum(p.numel() for p in norm.parameters()) == RECORDED['params']


def train(model, steps, start=0):
    """Gradients of the last of some steps of a forward and a backward pass, in which the norm sees an outlier."""
    for i in range(start, start + steps):
        torch.manual_seed(i)
        model.zero_grad()
        model(torch.randn(2, 3, 3, 8) * (20 if i == 4 else 1)).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), UnifiedNorm(8, window=3, warmup_iters=2, outlier_filtration=True)).train()


def test_compiles_with_equal_states():
    torch._dynamo.reset()
    eager = small()
    compiled = copy.deepcopy(eager)
    ours, theirs = train(torch.compile(compiled, fullgraph=True, backend='aot_eager'), 7), train(eager, 7)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))
    assert eager[1].skip_counter > 0


def test_resumes_exactly():
    through, first = small(), small()
    expected = train(through, 7)
    train(first, 4)
    resumed = small()
    resumed.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(train(resumed, 3, start=4), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.buffers(), through.buffers(), strict=True))


def test_any_family_can_use_it():
    model = create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), norm='unified', num_classes=3)
    x = torch.randn(2, 3, 64, 64)
    assert norm_factory('unified')(8).outlier_filtration
    model.train()(x).sum().backward()
    assert all(m.iters.item() == 1 for m in model.modules() if isinstance(m, UnifiedNorm))
    assert model.eval()(x).shape == (2, 3)
    model.train().set_grad_checkpointing()
    with pytest.raises(RuntimeError, match=r'activation checkpointing cannot repeat it; call set_grad_checkpointing'):
        model(x).sum().backward()


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r'window must be positive .* got window=\(2, 0\)'):
        UnifiedNorm(8, window=(2, 0))
