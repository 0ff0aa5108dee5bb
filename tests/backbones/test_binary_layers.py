"""Without this the layers of binarized models could drift from the authors': what they compute, and the gradients they
make up for steps that have none."""

import probe
import pytest
import torch
from torch import nn

from densezoo.backbones.binary import estimators
from densezoo.backbones.binary.estimators import ElasticQuantizer
from densezoo.backbones.binary.layers import BinaryLinear, BinaryProduct, ShiftLinear

BIVIT = probe.load('ops/bivit_op')
SHIFT = probe.load('ops/shiftaddvit_op')
LINEARS = {
    'linear_ste': dict(scale='mean'),
    'linear_ste32a': dict(scale='mean', input='float'),
    'linear_ada': {},
    'linear_ada32a': dict(input='float'),
    'linear_w32a1': dict(binary_weight=False),
}


def case(recorded, name):
    return next(case for case in recorded['cases'] if case['name'] == name)


def given(spec):
    """An input of a case: standard normal values, scaled and moved as the case says."""
    z = probe.image(spec['seed'], spec['shape'])
    how = spec.get('how', 'z')
    factors = {'1.2*z': 1.2, '2.4*z': 2.4, '0.3*z': 0.3, '0.1z': 0.1, '0.5z': 0.5, '50*z': 50.0, 'z': 1.0}
    moved = {'-4+3z': (3.0, -4.0), '-3+2z': (2.0, -3.0)}
    factor, summand = moved.get(how) or (factors[how], 0.0)
    return factor * z + summand


def check(case, **ours):
    assert ours.keys() == case['outputs'].keys()
    for name, stored in case['outputs'].items():
        probe.compare(ours[name], stored)


@pytest.mark.parametrize(
    ('name', 'binarize'),
    [
        ('BinaryQuantizer', estimators.sign),
        ('ZMeanBinaryQuantizer', estimators.step),
        ('ZMeanBinaryQuantizer_withScale', estimators.scaled_step),
        ('softmax_aware_binarization_with_ste', estimators.softmax_step),
        ('SoftmaxBinaryQuantizer_forward', estimators.softmax_step),
    ],
)
def test_steps_and_their_gradients(name, binarize):
    recorded = case(BIVIT, name)
    x = given(recorded['inputs']['x']).requires_grad_()
    y = binarize(x)
    torch.testing.assert_close(binarize(x.detach()), y, rtol=0, atol=0)  # without gradients: the same values
    outputs = {'y': y}
    if 'grad_out' in recorded['inputs']:
        y.backward(given(recorded['inputs']['grad_out']))
        outputs['grad_x'] = x.grad
    check(recorded, **outputs)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', [1, 2])
def test_elastic_quantizer(signed, bits):
    recorded = case(BIVIT, f'elastic_{"signed" if signed else "unsigned"}_{bits}bit_alpha0.7')
    quantizer = ElasticQuantizer(bits=bits, signed=signed).eval()
    with torch.no_grad():
        quantizer.alpha.fill_(recorded['inputs']['alpha'])
    x = given(recorded['inputs']['x']).requires_grad_()
    y = quantizer(x)
    y.backward(given(recorded['inputs']['grad_out']))
    check(recorded, y=y, grad_x=x.grad, grad_alpha=quantizer.alpha.grad)


def test_elastic_quantizer_starts_at_its_first_training_batch_alone():
    quantizer, x = ElasticQuantizer(), probe.image(0, [4, 8])
    quantizer.eval()(x)
    assert quantizer.alpha.item() == 1
    quantizer.train()(x)
    assert quantizer.alpha.item() == pytest.approx(2 * x.abs().mean().item())
    copied = ElasticQuantizer()
    copied.load_state_dict(quantizer.state_dict())
    copied.train()(5 * x)
    assert copied.alpha.item() == quantizer.alpha.item()


@pytest.mark.parametrize('name', LINEARS)
def test_binary_linear(name):
    recorded, prefix = case(BIVIT, name), name.removeprefix('linear_')
    layer = BinaryLinear(64, 48, **LINEARS[name])
    layer.load_state_dict(
        {key: probe.values(f'{prefix}.{key}', value.shape) for key, value in layer.state_dict().items()}
    )
    x = probe.image(4, [2, 49, 64]).requires_grad_()
    y = layer(x)
    loss = y.square().mean()
    loss.backward()
    gradients = {f'grad_{prefix}.{key}': value.grad for key, value in layer.named_parameters()}
    check(recorded, y=y, loss=loss, grad_input=x.grad, **gradients)


def test_a_scale_of_zeros_starts_at_the_mean_weight():
    recorded = case(BIVIT, 'linear_ada_first_run_init')
    layer = BinaryLinear(64, 48)
    layer.load_state_dict(
        {
            'weight': probe.values('ada.weight', [48, 64]),
            'bias': probe.values('ada.bias', [48]),
            'scaling_factor': torch.zeros(48, 1),
        }
    )
    check(recorded, y=layer(probe.image(4, [2, 49, 64])), scaling_factor=layer.scaling_factor)


@pytest.mark.parametrize('width', [1, 31, 33, 100])
def test_widths_that_words_do_not_divide(width):
    linear = nn.Linear(width, 5, bias=False)
    layer, x = BinaryLinear.from_linear(linear), probe.image(0, [3, width])
    expected = (x.sign() @ (linear.weight - linear.weight.mean(1, keepdim=True)).sign().t()) * linear.weight.abs().mean(
        1
    )
    torch.testing.assert_close(layer(x), expected)
    assert layer.bias is not None and not layer.bias.any()


def test_product_counts_the_values_that_attention_reaches():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 8).unbind(0)
    bias = torch.randn(5, 5)
    bias[:, 2] = -torch.inf
    out = BinaryProduct(scale=0.5)(query, key, value, bias)
    attention = (0.5 * query.sign() @ key.sign().transpose(1, 2) + bias).softmax(-1)
    chosen = (attention >= 0.25 * attention.amax(-1, keepdim=True)).float()
    torch.testing.assert_close(out, chosen @ value.sign())
    assert not chosen[..., 2].any() and 0 < chosen.mean() < 0.8


# ---- powers of two


def test_powers_of_two_next_to_weights():
    recorded = case(SHIFT, 'round_power_of_2')
    shift, signs = estimators.split_power(given(recorded['inputs']['w']))
    check(recorded, shift=shift, sign=signs, w_pow2=torch.exp2(shift) * signs)


@pytest.mark.parametrize('bits', [16, 4])
def test_fixed_point(bits):
    recorded = case(SHIFT, f'round_to_fixed_{bits}_{bits}')
    check(recorded, y=estimators.fixed_point(given(recorded['inputs']['x']), bits, bits))


@pytest.mark.parametrize('form', ['ps', 'q'])
def test_shift_linear(form):
    recorded = case(SHIFT, f'linear_shift_{form.upper()}')
    layer = ShiftLinear(32, 48, form=form)
    inputs = {name: given(spec) for name, spec in recorded['inputs'].items()}
    layer.load_state_dict({name: inputs[name] for name in layer.state_dict()})
    x = inputs['x'].requires_grad_()
    y = layer(x)
    y.backward(inputs['grad_out'])
    trained = 'shift' if form == 'ps' else 'weight'
    after = {f'{trained}_after': getattr(layer, trained)}
    check(recorded, y=y, **after, grad_x=x.grad, **{f'grad_{n}': p.grad for n, p in layer.named_parameters()})
    exponents, signs = layer.exponents()
    torch.testing.assert_close(torch.exp2(exponents.float()) * signs, layer.power_weight().detach())
    assert exponents.min() >= layer.lowest and exponents.max() <= 0


def test_evaluation_leaves_what_is_trained_alone():
    layer = ShiftLinear(4, 3).eval()
    with torch.no_grad():
        layer.shift.fill_(3.0)
    layer(torch.randn(2, 4))
    assert (layer.shift == 3).all() and (layer.power_weight().abs() <= 1).all()


def test_a_shift_layer_of_a_linear_one():
    linear = nn.Linear(33, 7)
    layer = ShiftLinear.from_linear(linear)
    ratio = (layer.power_weight() / linear.weight).log2()
    assert ratio.abs().max() <= 0.5  # the nearest power in the log domain
    torch.testing.assert_close(layer.bias, linear.bias)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: BinaryLinear(4, 4, input='sing'), "input must be one of elastic, float, sign, got 'sing'.*sign"),
        (lambda: BinaryLinear(4, 4, scale='max'), 'scale must be one of learned, mean'),
        (lambda: BinaryProduct(scale=1.0, map='hard'), 'map must be one of softmax, step'),
        (lambda: BinaryProduct(scale=1.0, threshold=0.0), 'threshold must be above 0'),
        (lambda: ShiftLinear(4, 4, form='sp'), 'form must be one of ps, q'),
        (lambda: ShiftLinear(4, 4, weight_bits=2), 'weight_bits must be at least 3'),
        (lambda: ElasticQuantizer(bits=0), 'bits must be at least 1'),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
