"""Without this weights that are sums of two powers could differ from the authors', get other gradients than theirs, or
change when they are packed."""

import probe
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densezoo.backbones.binary import MixtureLinear, ShiftLinear, ShiftSumLinear, pack
from densezoo.backbones.binary.estimators import fixed_point
from densezoo.backbones.binary.sums import nearest_sum, shift_layer, split_sum, sum_of_powers

# the authors' table: sums in its order, so that the first of equally near ones wins
SUMS = torch.tensor([a + b for a in (0, 1 / 2, 1 / 8, 1 / 32) for b in (0, 1, 1 / 4, 1 / 16)])
TABLE = SUMS * (1 / SUMS.max())
FORMS = ('sp2', 'apot')


def searched(weight):
    """The scaled sum that is nearest to each weight, by trying all."""
    return TABLE[(weight.abs()[None] - TABLE[:, None, None]).abs().min(0)[1]] * weight.sign()


def linear(inputs, outputs, **options):
    layer = nn.Linear(inputs, outputs, **options)
    nn.init.normal_(layer.weight, std=0.5)
    return layer


def test_a_converted_layer_of_the_authors():
    recorded = next(c for c in probe.load('ops/shiftaddvit_op')['cases'] if c['name'] == 'linear_shift_SP2_APoT')
    parent = nn.Linear(32, 48)
    with torch.no_grad():
        parent.weight.copy_(0.5 * probe.image(7, [48, 32]))
        parent.bias.copy_(0.1 * probe.image(4, [48]))
    layer = ShiftSumLinear.from_linear(parent).eval()
    for name, stored in recorded['outputs'].items():
        probe.compare(layer(probe.image(5, [2, 10, 32])) if name == 'y' else getattr(layer, name), stored)


def test_the_nearest_sum():
    """Where two are equally near too: 1/32 lies between 1/48 and 2/48, and half of all types' numbers are such."""
    torch.manual_seed(0)
    for weight in (
        torch.randn(50, 999),
        torch.arange(-1024, 1025)[None] / 1024,
        torch.rand(9, 999).bfloat16().float(),
        torch.zeros(1, 1),
        torch.tensor([[7.0, -7.0]]),
    ):
        torch.testing.assert_close(nearest_sum(weight) * 2 / 3, searched(weight), rtol=1e-6, atol=0)
        torch.testing.assert_close(sum_of_powers(**split_sum(weight)), nearest_sum(weight), rtol=0, atol=0)
    values = torch.cat([-TABLE, TABLE])[None]
    torch.testing.assert_close(nearest_sum(values) * 2 / 3, values, rtol=1e-6, atol=0)


def through(x, y):
    """y, with the gradient of x."""
    return x + (y - x).detach()


def times(x, signs):
    """x times signs; the gradient of the signs is 1, not x: as the authors have it."""
    return x * signs.detach() + signs - signs.detach()


def sp2_weight(shift_1, shift_2, sign_1, sign_2, sign):
    a, b = (through(shift, shift.clamp(-2, 0).round()) for shift in (shift_1, shift_2))
    first, second = (through(s, s.clamp(0, 1).round()) for s in (sign_1, sign_2))
    total = times(2 ** (2 * a), first) + times(2 ** (2 * b - 1), second)
    return times(total * 2 / 3, through(sign, sign.round().sign()))


def apot_weight(weight, weight_alpha):
    data = (weight / weight_alpha).clamp(-1, 1)
    return through(data, searched(data.detach().float()).double()) * weight_alpha


@pytest.mark.parametrize('form', FORMS)
def test_gradients_are_those_of_the_authors(form):
    torch.manual_seed(0)
    layer = ShiftSumLinear(7, 5, form=form).double().eval()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name == 'weight_alpha':
                p.fill_(0.7)
            elif name != 'bias':
                p.normal_()
    x = torch.randn(4, 7, dtype=torch.float64)
    weights = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    bias = weights.pop('bias')
    made = (sp2_weight if form == 'sp2' else apot_weight)(**weights)
    expected, grad = F.linear(fixed_point(x), made, through(bias, fixed_point(bias))), torch.randn(4, 5).double()
    expected.backward(grad)
    y = layer(x)
    y.backward(grad)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    for name, p in {**weights, 'bias': bias}.items():
        torch.testing.assert_close(getattr(layer, name).grad, p.grad, rtol=1e-6, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


@pytest.mark.parametrize('form', FORMS)
def test_training_moves_weights_and_keeps_them_in_range(form):
    torch.manual_seed(0)
    layer = shift_layer(linear(9, 6), form=form).train()
    x, target = torch.randn(64, 9), torch.randn(64, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before, losses = layer.power_weight().detach(), []
    for _ in range(30):
        losses.append(F.mse_loss(layer(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and not torch.equal(layer.power_weight(), before)
    if form == 'sp2':
        for names, limits in ((('shift_1', 'shift_2'), (-2, 0)), (('sign_1', 'sign_2'), (0, 1))):
            for part in map(layer.get_parameter, names):
                nn.init.normal_(part, std=5)
                layer(x)
                assert (part.min(), part.max()) == limits


def test_evaluation_leaves_what_is_trained_alone():
    layer = ShiftSumLinear(4, 3).eval()
    with torch.no_grad():
        layer.shift_1.fill_(3.0)
    layer(torch.randn(2, 4))
    assert (layer.shift_1 == 3).all() and (layer.power_weight().abs() <= 1.5).all()


def test_small_weights_need_a_scale():
    """Trained weights are small: of an own scale they keep their digits, without one they are lost."""
    torch.manual_seed(0)
    parent, x = nn.Linear(200, 50), torch.randn(20, 200)
    with torch.no_grad():
        parent.weight.normal_(std=0.01).clamp_(-0.02, 0.02)
        errors = {form: (shift_layer(parent, form=form)(x) - parent(x)).std() for form in ('ps', *FORMS)}
    assert errors['apot'] < 0.7 * errors['ps'] < 0.7 * errors['sp2']
    assert shift_layer(parent, form='apot').weight_alpha == parent.weight.abs().max()
    nn.init.zeros_(parent.weight)
    for form in FORMS:
        layer = shift_layer(parent, form=form)
        torch.testing.assert_close(layer(x), fixed_point(parent.bias).expand(20, 50))
        layer(x).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('width', [1, 6, 33])
def test_packed(width, form):
    torch.manual_seed(0)
    layer = shift_layer(linear(width, 7, bias=width != 6), form=form).eval()
    if form == 'apot':
        nn.init.constant_(layer.weight_alpha, -0.6)
    packed, x = pack(layer), torch.randn(2, 3, width)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))
    assert packed.weight.shape == (7, -(-width // 6)) and packed.weight.dtype == torch.int32
    fresh = pack(ShiftSumLinear(width, 7, bias=width != 6, form=form).eval())
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), packed(x))
    torch.testing.assert_close(fresh.half()(x.half()).float(), packed(x), rtol=0, atol=0.03)


@pytest.mark.parametrize('form', FORMS)
def test_exported_equals_eager(form):
    torch.manual_seed(0)
    layer, x = shift_layer(linear(40, 30), form=form).eval(), torch.randn(2, 40)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_a_trained_layer_becomes_one_by_its_state(form):
    """The authors' keys, and those of a linear layer."""
    torch.manual_seed(0)
    parent, layer = linear(6, 4), ShiftSumLinear(6, 4, form=form)
    wanted = shift_layer(parent, form=form)
    keys = {'shift_1', 'shift_2', 'sign_1', 'sign_2', 'sign'} if form == 'sp2' else {'weight', 'weight_alpha'}
    assert layer.state_dict().keys() == {*keys, 'bias'}
    state = {f'a.{key}': value for key, value in parent.state_dict().items()}
    layer.resample(state, 'a.')
    layer.load_state_dict({key.removeprefix('a.'): value for key, value in state.items()})
    assert torch.equal(layer.power_weight(), wanted.power_weight()) and layer.scale() == wanted.scale()
    state = {f'a.{key}': value for key, value in wanted.state_dict().items()}
    layer.resample(state, 'a.')
    assert all(torch.equal(state[f'a.{key}'], value) for key, value in wanted.state_dict().items())


def test_expert_of_a_mixture():
    torch.manual_seed(0)
    parent = linear(6, 4)
    mixture = MixtureLinear(parent, form='sp2')
    assert type(mixture.experts[1]) is ShiftSumLinear
    torch.testing.assert_close(mixture.experts[1].power_weight() * 2 / 3, searched(parent.weight.detach()))
    assert type(MixtureLinear(parent, form='q').experts[1]) is ShiftLinear


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda: ShiftSumLinear(4, 4, form='ps'), ValueError, "form must be one of apot, sp2, got 'ps'"),
        (lambda: ShiftSumLinear(4, 4, weight_bits=4), ValueError, 'weight_bits must be 5, .*got weight_bits=4'),
        (lambda: shift_layer(nn.Linear(4, 4), form='sp'), ValueError, 'form must be one of apot, ps, q, sp2.*mean sp2'),
        (lambda: ShiftSumLinear(4, 4).exponents(), TypeError, r'have no one exponent; see terms\(\)'),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
