"""Without this HiLo attention or LITv2's dense forms could drift from the published system."""

import golden
import probe
import pytest
import torch
from merging import transposed, without_padding

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers.deform import DeformableMerging
from densezoo.backbones.litv2 import HiLo

HILO = probe.load('hilo_attention')


# ---- goldens


@pytest.mark.parametrize('name', [case['name'] for case in HILO['cases']])
def test_recorded_attention(name):
    case = golden.case(HILO, name)
    settings = case['config']
    state = probe.golden_state(HILO, case)
    module = HiLo(
        dim=settings['dim'],
        num_heads=settings['num_heads'],
        window_size=settings['window_size'],
        alpha=settings['alpha'],
        qkv_bias=settings['qkv_bias'],
    )
    module.load_state_dict(state)
    if 'params' in case:
        assert sum(p.numel() for p in module.parameters()) == case['params']
    x = probe.image(case['seed'], case['shape']).requires_grad_()
    out = module(x.unflatten(1, (settings['H'], settings['W']))).flatten(1, 2)
    if not name.startswith('grad'):
        stored = case['outputs']['out']
        probe.compare(out, stored, case['fp32_vs_fp64_maxdiff_over_std']['out'] * stored['std'])
        return
    loss = out.square().mean()
    loss.backward()
    probe.compare(loss, case['outputs']['loss'])
    gradients = {'grad_input': x.grad, **{f'grad_{key}': p.grad for key, p in module.named_parameters()}}
    for key in case['outputs'].keys() - {'loss'}:
        probe.compare(gradients[key], case['outputs'][key], relative=1e-3)


@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_other_shares_of_low_heads(alpha):
    recorded = probe.load(f'litv2_s__alpha{alpha}')
    model = create_model('litv2_s', alpha=alpha).eval()
    assert sum(p.numel() for p in model.parameters()) == recorded['params']
    load_checkpoint(model, probe.golden_state(recorded))
    golden.run(model, recorded, golden.case(recorded, 'logits_224'))


def test_recorded_gradients(monkeypatch):
    monkeypatch.setattr(DeformableMerging, 'forward', transposed)
    recorded = probe.load('litv2_s')
    golden.run(golden.build('litv2_s'), recorded, golden.case(recorded, 'grad_224'))


@pytest.mark.parametrize(
    ('name', 'case_name'),
    [
        pytest.param(f'litv2_s__{form}', f'features_{size}', marks=[] if size == '216x280' else pytest.mark.slow)
        for form in ('dense', 'dense_det')
        for size in ('216x280', '200x264', '198x262')
    ],
)
def test_maps_whose_border_the_authors_drop(name, case_name):
    recorded = probe.load(name)
    model = without_padding(load_checkpoint(golden.create(name).eval(), probe.golden_state(recorded)))
    model.downsample_layers[0].drops_border = True  # their stem pads
    golden.run(model, recorded, golden.case(recorded, case_name))


# ---- paper facts


@pytest.mark.parametrize(('name', 'millions'), [('litv2_s', 27.8), ('litv2_m', 48.8), ('litv2_b', 86.5)])
def test_parameter_counts(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(('alpha', 'low'), [(0.0, 0), (0.2, 2), (0.4, 4), (0.5, 6), (0.7, 8), (0.9, 10), (1.0, 12)])
def test_heads_of_the_published_shares(alpha, low):
    with torch.device('meta'):
        module = HiLo(dim=384, num_heads=12, alpha=alpha)
    assert (module.l_heads, module.h_heads) == (low, 12 - low)


def test_branches_are_side_by_side():
    """High heads see their window alone, low heads the averages of all windows."""
    torch.manual_seed(0)
    module = HiLo(dim=32, num_heads=4, alpha=0.5)
    x = torch.randn(1, 4, 4, 32)
    changed = x.clone()
    changed[0, 3, 3] += 1  # in the last window
    with torch.no_grad():
        moved = (module(x) - module(changed)).abs()[0]
    assert not moved[:2, :, :16].any() and not moved[:, :2, :16].any()
    assert (moved[2:, 2:, :16] > 0).all() and (moved[:, :, 16:] > 0).any(-1).all()


@pytest.mark.parametrize('options', [{}, {'alpha': 0.0}, {'alpha': 1.0}, {'window_size': 1}, {'window_size': 5}])
def test_in_another_family(options):
    model = create_model(
        'poolformer_s12',
        depths=(1, 1, 1, 1),
        dims=(32, 64, 96, 128),
        mixers=('pool', 'pool', {'name': 'hilo', **options}, 'hilo'),
        num_classes=3,
    )
    out = model(torch.randn(2, 3, 40, 72))
    out.sum().backward()
    assert out.shape == (2, 3)
    assert all(p.grad is not None for p in model.stages[2].parameters())


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'num_heads': 5}, 'num_heads must divide the width of its stage, got num_heads=5, dim=64'),
        ({'window_size': 0}, 'window_size must be positive and alpha from 0 to 1, got window_size=0, alpha=0.9'),
        ({'alpha': 1.5}, 'got window_size=2, alpha=1.5'),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        HiLo(dim=64, **options)
