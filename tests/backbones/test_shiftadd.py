"""Without this ShiftAddViT could drift from the authors' code: additive attention, mixtures of linear layers and
shifts, and whole models under their keys; and its gates from spreading tokens as the paper's loss wants it."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densezoo.backbones import binarize, create_model, load_checkpoint
from densezoo.backbones.binary import MixtureLinear, ShiftLinear, ShiftSumLinear, balance_loss, hashes_of
from densezoo.backbones.binary.estimators import fixed_point, power_of_two, split_power
from densezoo.backbones.binary.mixture import balance
from densezoo.backbones.binary.shiftadd import AdditiveAttention, LinearAttention, MeanAttention
from densezoo.backbones.layers import ConvMlp
from densezoo.backbones.registry import model_class

RECORDED = probe.load('ops/shiftaddvit_op')
MODELS = {
    'shiftaddvit_pvt_v2_b0_linangular': dict(attention_layers='dense', mlp_layers='dense'),
    'shiftaddvit_pvt_v2_b0_moe': dict(attention_layers='mixture', mlp_layers='mixture'),
    'shiftaddvit_pvt_v2_b0_shift': dict(attention_layers='shift', mlp_layers='dense'),
}
LEVELS = ('c2_tokens', 'c3_tokens', 'c4_tokens', 'c5_tokens')


def state_of(recorded, prefix=''):
    """The authors' state; shifts and signs are those of the weights that `<layer>.weight` would have."""
    state = {}
    for key, value in probe.golden_state(recorded).items():
        layer, _, last = key.rpartition('.')
        if last in ('shift', 'sign'):
            value = split_power(probe.values(f'{layer}.weight', value.shape))[last == 'sign']
        if key.startswith(prefix):
            state[key.removeprefix(prefix)] = value
    return state


def loaded(module, prefix):
    """A module with the authors' values of the keys that start so."""
    state = state_of(RECORDED, f'{prefix}.')
    for path, part in module.named_modules():
        if hasattr(part, 'resample'):
            part.resample(state, f'{path}.' if path else '')
    module.load_state_dict(state)
    return module.eval()


def additive(prefix):
    """Attention of the authors' kind, with its layers as mixtures for the keys `moe_attn`."""
    if prefix.startswith('bin'):
        return loaded(MeanAttention(dim=64, num_heads=2, over_batch=True, sparse='sparse' in prefix), prefix)
    layer = AdditiveAttention(dim=64, num_heads=2)
    if prefix == 'moe_attn':
        for name in ('to_qk', 'to_v', 'proj'):
            setattr(layer, name, MixtureLinear(getattr(layer, name)))
    return loaded(layer, prefix)


def mlp():
    layer = ConvMlp(dim=64, ratio=2)
    layer.fc1, layer.fc2 = MixtureLinear(layer.fc1), MixtureLinear(layer.fc2)
    state = {key.replace('dwconv.dwconv.', 'dwconv.'): v for key, v in state_of(RECORDED, 'moe_mlp.').items()}
    layer.load_state_dict(state)
    return layer.eval()


MODULES = {
    'lin_angular_ksh': lambda: additive('ksh'),
    'lin_angular_binary': lambda: additive('bin'),
    'lin_angular_binary_sparse': lambda: additive('bin_sparse'),
    'lin_angular_ksh_moe': lambda: additive('moe_attn'),
    'linear_attn': lambda: loaded(LinearAttention(dim=64, num_heads=2), 'lin'),
    'moe_mlp': mlp,
    'moe_fc_naive': lambda: loaded(MixtureLinear(nn.Linear(64, 96)), 'moe_fc'),
    'moe_fc_noisy_v2_eval': lambda: loaded(MixtureLinear(nn.Linear(64, 96), gate='soft'), 'moe_v2'),
    'grad_lin_angular_binary': lambda: additive('bin'),
    'grad_lin_angular_ksh': lambda: additive('ksh'),
    'grad_moe_fc': lambda: loaded(MixtureLinear(nn.Linear(64, 96)), 'moe_fc'),
}


@pytest.mark.parametrize('name', MODULES)
def test_modules(name):
    """Values at 1e-5: hashing moves outputs little."""
    recorded, module = golden.case(RECORDED, name), MODULES[name]()
    x = probe.image(12, [2, 196, 64]).requires_grad_()
    y = module(x.view(2, 14, 14, 64)).flatten(1, 2)
    outputs = {'y': y, 'loss': y.square().mean()}
    if name.startswith('grad'):
        outputs['loss'].backward()
        outputs['grad_input'] = x.grad
    for key, stored in recorded['outputs'].items():
        if key.startswith('grad_') and key != 'grad_input':
            outputs[key] = dict(module.named_parameters())[key.split('.', 1)[1]].grad
        probe.compare(outputs[key], stored, relative=1e-3 if key.startswith('grad') else 1e-5)


def test_gates():
    recorded, layer = golden.case(RECORDED, 'moe_fc_gates'), loaded(MixtureLinear(nn.Linear(64, 96)), 'moe_fc')
    x = probe.image(12, [2, 196, 64])
    second = layer.gate(x.flatten(0, 1))[0]
    probe.compare(torch.cat([~second, second], 1).float(), recorded['outputs']['gates'])
    probe.compare(layer.shares(x)[1:], recorded['outputs']['share_shift'])


def test_a_shifted_depthwise_convolution():
    inputs = golden.case(RECORDED, 'conv2d_shift_PS_dw3x3')['inputs']
    shift, sign, bias, x = (probe.image(inputs[n]['seed'], inputs[n]['shape']) for n in ('shift', 'sign', 'bias', 'x'))
    weight = power_of_two(2 * shift - 3, sign, -14)
    y = F.conv2d(fixed_point(x), weight, fixed_point(0.1 * bias), padding=1, groups=8)
    probe.compare(y, golden.case(RECORDED, 'conv2d_shift_PS_dw3x3')['outputs']['y'])


@pytest.mark.parametrize(
    ('stem', 'name'),
    [
        ('shiftaddvit_pvt_v2_b0_moe', 'features_200x264'),
        pytest.param('shiftaddvit_pvt_v2_b0_moe', 'logits_224', marks=pytest.mark.slow),
        pytest.param('shiftaddvit_pvt_v2_b0_moe', 'grad_224', marks=pytest.mark.slow),
        *(
            pytest.param(f'shiftaddvit_pvt_v2_b0_{kind}', name, marks=pytest.mark.slow)
            for kind in ('linangular', 'shift')
            for name in ('logits_224', 'features_200x264')
        ),
    ],
)
def test_models_of_the_authors(stem, name):
    recorded = probe.load(stem)
    model = binarize(create_model('pvt_v2_b0'), 'shiftadd', **MODELS[stem])
    load_checkpoint(model, state_of(recorded)).eval()
    assert sum(p.numel() for p in model.parameters()) == recorded['params']
    case = golden.case(recorded, name)
    x = probe.image(case['seed'], case['shape'])
    if name.startswith('grad'):
        outputs = golden._gradients(model, recorded, case, x)
    else:
        with torch.no_grad():
            final, maps = model.forward_intermediates(x)
            outputs = {'logits': model.forward_head(final), **dict(zip(LEVELS, (m.flatten(2).mT for m in maps)))}
    for key, stored in case['outputs'].items():
        if isinstance(stored, dict):
            noise = case.get('reldiff_f32_vs_f64', {}).get(key, 0.0) * stored['absmax']
            probe.compare(outputs[key], stored, noise, relative=1e-3 if name.startswith('grad') else 1e-5)


# ---- properties


def small(**overrides):
    torch.manual_seed(0)
    return create_model('pvt_v2_b0', num_classes=5, **{**model_class('pvt_v2_b0').reduced, **overrides})


@pytest.mark.parametrize(
    'settings',
    [
        dict(iterations=2, gate='noisy'),
        dict(attention='mean', gate='soft', attention_layers='mixture'),
        dict(attention='sparse', mlp_layers='shift', form='q'),
        dict(attention='linear', form='sp2', gate='noisy'),
        dict(attention='linear', mlp_layers='shift', form='apot'),
    ],
    ids=['hash', 'mean', 'sparse', 'linear', 'sums'],
)
def test_every_parameter_learns_and_batches_equal_single_images(settings):
    model = binarize(small(), 'shiftadd', **settings).train()
    x = probe.image(0, [2, 3, 72, 40])
    loss, balancing = model(x).square().mean(), balance_loss(model)
    assert (balancing is None) == ('gate' not in settings) and balance_loss(model) is None
    (loss if balancing is None else loss + balancing).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(hash.trained for hash in hashes_of(model))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]), rtol=1e-4, atol=1e-4)
        again = load_checkpoint(binarize(small(), 'shiftadd', **settings).eval(), model.state_dict())
        torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize('method', ['ecoformer', 'shiftadd'])
def test_bf16_autocast(method):
    """Codes are those of float32, as far as their input is."""
    model = binarize(small(), method, iterations=1).train()
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(probe.image(0, [2, 3, 64, 64]))
    assert logits.isfinite().all() and all(hash.A.dtype == torch.float32 for hash in hashes_of(model))
    logits.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_weights_of_a_step_before_load():
    """The authors train attention first, then layers: the weights of one step start the next."""
    first = binarize(small(), 'shiftadd', attention_layers='dense', mlp_layers='dense', iterations=1).train()
    first(probe.image(0, [2, 3, 64, 64]))
    second = load_checkpoint(binarize(small(), 'shiftadd', attention_layers='shift'), first.state_dict())
    dense, shifted = (m.stages[1][0].token_mixer.to_v for m in (first, second))
    assert torch.equal(shifted.shift, split_power(dense.weight.detach())[0])
    mixture = second.stages[1][0].mlp.fc1
    assert torch.equal(mixture.experts[0].weight, first.stages[1][0].mlp.fc1.weight)
    assert torch.equal(mixture.experts[1].shift, split_power(mixture.experts[0].weight.detach())[0])
    assert all(hash.trained for hash in hashes_of(second))


def test_own_attention_can_stay():
    swin = create_model(
        'swin_tiny_patch4_window7_224', num_classes=5, **model_class('swin_tiny_patch4_window7_224').reduced
    ).eval()
    model = binarize(swin, 'shiftadd', attention=None, mlp_layers='shift').eval()
    kinds = {type(m) for path, m in model.named_modules() if path.endswith(('qkv', 'proj', 'fc1', 'fc2'))}
    assert kinds == {ShiftLinear}
    with torch.no_grad():
        assert model(probe.image(0, [1, 3, 64, 64])).isfinite().all()


@pytest.mark.parametrize(('name', 'overrides'), [('pvt_v2_b0', {}), ('deit_tiny_patch16_224', dict(depth=1, dim=48))])
def test_linear_attention_has_the_weights_of_softmax_attention(name, overrides):
    """Queries, keys and values, from separate layers and from one, at full resolution."""
    torch.manual_seed(0)
    reduced = model_class(name).reduced if name == 'pvt_v2_b0' else {}
    parent = create_model(name, num_classes=5, **{**reduced, **overrides}).eval()
    settings = dict(attention='linear', attention_layers='dense', mlp_layers='dense')
    model = binarize(parent, 'shiftadd', **settings).eval()
    source, layer = next(
        (old, new)
        for (_, old), (_, new) in zip(parent.named_modules(), model.named_modules())
        if isinstance(new, LinearAttention)
    )
    state = source.state_dict()
    weight, bias = (
        state[f'qkv.{kind}'] if f'qkv.{kind}' in state else torch.cat([state[f'q.{kind}'], state[f'kv.{kind}']])
        for kind in ('weight', 'bias')
    )
    x = torch.randn(2, 9, weight.shape[1])
    query, key, value = F.linear(x, weight, bias).unflatten(2, (3, source.num_heads, -1)).permute(2, 0, 3, 1, 4)
    expected = (query @ key.mT * query.shape[-1] ** -0.5) @ value
    with torch.no_grad():
        torch.testing.assert_close(layer(x), source.proj(expected.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)
        again = load_checkpoint(binarize(parent, 'shiftadd', **settings).eval(), parent.state_dict())
        torch.testing.assert_close(again(probe.image(0, [1, 3, 64, 64])), model(probe.image(0, [1, 3, 64, 64])))


def test_sums_of_two_powers_replace_the_layers():
    model = binarize(small(), 'shiftadd', attention='linear', mlp_layers='mixture', form='sp2')
    attention = model.stages[0][0].token_mixer
    assert all(type(layer) is ShiftSumLinear for layer in (attention.q, attention.kv, attention.proj))
    assert type(model.stages[0][0].mlp.fc1.experts[1]) is ShiftSumLinear


@pytest.mark.parametrize('latencies', [(6.0, 4.0), (4.0, 6.0)])
def test_balancing_spreads_tokens_against_latency(latencies):
    torch.manual_seed(0)
    logits = torch.zeros(100, 2, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=10.0)
    for _ in range(60):
        noisy = logits + 0.5 * torch.randn_like(logits)
        loss = balance(logits.softmax(-1), logits, noisy, torch.tensor(0.5), latencies)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = logits.detach().softmax(-1).mean(0)[0].item()
    assert share == pytest.approx(1 - latencies[0] / sum(latencies), abs=0.05)


def test_very_small_outputs_are_cut_off_and_large_ones_are_not():
    layer = MixtureLinear(nn.Linear(1, 1)).eval()
    with torch.no_grad():
        for expert in layer.experts:
            expert.bias.fill_(0)
        layer.experts[0].weight.fill_(1)
        layer.experts[1].shift.fill_(0)
        layer.experts[1].sign.fill_(1)
        out = layer(torch.tensor([[-100.0], [200.0]]))
    torch.testing.assert_close(out, torch.tensor([[-36.0437], [200.0]]))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'attention': 'hsh'}, "attention must be one of .*got 'hsh'; did you mean hash"),
        ({'mlp_layers': 'shifts'}, "mlp_layers must be one of dense, mixture, shift, got 'shifts'; did you mean shift"),
        ({'gate': 'nave'}, "gate must be one of naive, noisy, soft, got 'nave'; did you mean naive"),
        ({'latencies': (1.0,)}, 'latencies must be two positive numbers'),
        ({'weight_bits': 1}, 'weight_bits must be at least 3'),
        ({'form': 'sp2', 'weight_bits': 4}, 'weight_bits must be 5'),
        ({'form': 'apt'}, "form must be one of apot, ps, q, sp2, got 'apt'; did you mean apot"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        binarize(small(), 'shiftadd', **settings)
