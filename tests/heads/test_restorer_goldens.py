"""Without this a restorer could drift from its authors' code, whose outputs and gradients were recorded."""

import itertools
import math

import probe
import pytest
import torch
from torch import nn

from densezoo.backbones import load_checkpoint
from densezoo.heads import TAT, Histoformer, Restormer
from densezoo.heads.histoformer import DualScaleMLP, HistogramAttention
from densezoo.heads.losses import pearson
from densezoo.heads.mat import FirstStage
from densezoo.heads.mat_layers import MaskedWindowAttention, MATLayer, PartialConv

NETWORKS = {'restormer': Restormer, 'histoformer': Histoformer, 'tat': TAT}
SLOW = {'restormer', 'histoformer'}  # of full width and depth
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in (
        'restormer',
        'restormer_d24',
        'restormer_d24_biasfree',
        'histoformer',
        'histoformer_d24',
        'histoformer_d24_biasfree',
        'tat_small',
    )
]


def network(name, golden):
    config = golden['config']
    kind = name.split('_')[0]
    model = NETWORKS[kind](
        dim=config['dim'],
        depths=config['num_blocks'],
        refinement=config['refinement'],
        num_heads=config['heads'],
        expansion=config['ffn_expansion_factor'],
        bias=config['bias'],
        norm={'WithBias': 'with_bias', 'BiasFree': 'bias_free'}[config['norm']],
    )
    state = probe.golden_state(golden)
    for key in config.get('post_fill_scale', {}):
        state[key] = (state[key] - 0.5) * 3
    load_checkpoint(model, state)
    assert sum(p.numel() for p in model.parameters()) == golden['params']
    return model.double().eval() if kind == 'histoformer' else model.eval()


@pytest.mark.parametrize('name', NAMES)
def test_networks(name):
    golden = probe.load(f'heads/{name}')
    model = network(name, golden)
    dtype = next(model.parameters()).dtype
    for case in golden['cases']:
        images = probe.image(case['seed'], case['shape']).to(dtype)
        recorded = case['outputs']
        if 'out' in recorded:
            with torch.no_grad():
                out = model(images)
            noise = case.get('sensitivity_1e6', 0.0)
            probe.compare(out, recorded['out'], noise=noise)
            probe.compare(out - images, recorded['residual'], noise=noise)
            continue
        images.requires_grad_()
        model(images).square().mean().backward()
        parameters = dict(model.named_parameters())
        for key, stored in recorded.items():
            key = key.removeprefix('grad_')
            gradient = images.grad if key == 'input' else parameters[key].grad
            probe.compare(gradient, stored, relative=1e-3)


@pytest.mark.parametrize('name', ['histoformer_attention', 'histoformer_ffn'])
def test_histoformer_parts(name):
    golden = probe.load(f'heads/{name}')
    config = golden['config']
    if 'heads' in config:
        part = HistogramAttention(config['dim'], config['heads'])
    else:
        part = DualScaleMLP(config['dim'], expansion=config['ffn_expansion_factor'])
    load_checkpoint(part, probe.golden_state(golden))
    for case in golden['cases']:
        double = case.get('dtype') == 'float64'
        x = probe.image(case['seed'], case['shape'])
        with torch.no_grad():
            out = part.double()(x.double()) if double else part.float()(x)
        probe.compare(out, case['outputs']['out'])


def test_pearson():
    a, b = probe.image(20, (3, 3, 16, 20)), probe.image(21, (3, 3, 16, 20))
    others = {'random': b, 'correlated': 0.7 * a + 0.3 * b + 0.1, 'constant_target': torch.full_like(a, 0.25)}
    cases = probe.load('heads/histoformer_pearson_loss')['cases']
    assert {case['name'] for case in cases} == others.keys()
    for case in cases:
        x = a.clone().requires_grad_()
        loss = pearson(x, others[case['name']])
        assert loss.item() == pytest.approx(float(case['outputs']['loss']), rel=1e-4)
        loss.backward()
        probe.compare(x.grad, case['outputs']['grad_input'], relative=1e-3)


def mat_mask(batch, height, width):
    """The goldens' formula; 1 = known."""
    mask = torch.zeros(batch, 1, height, width)
    for b, y, x in itertools.product(range(batch), range(height), range(width)):
        hole = height // 4 <= y < height // 2 and width // 4 <= x < width // 2
        mask[b, 0, y, x] = (y // 5 + x // 7 + b) % 3 == 0 and not hole
    return mask


def load_mat(part: nn.Module, golden, prefix=''):
    """Weights of unit variance, as the notes say; constant filters as they are computed."""
    state = {}
    for key, value in probe.golden_state(golden).items():
        if key.endswith('resample_filter'):
            value = part.state_dict()[key.removeprefix(prefix)]
        elif value.ndim > 1:
            value = value * math.sqrt(math.prod(value.shape[1:]))
        state[key.removeprefix(prefix)] = value
    load_checkpoint(part, state)
    assert sum(p.numel() for p in part.parameters()) == golden['params']
    return part.eval()


@torch.no_grad()
def test_mat_partial_conv():
    golden = probe.load('heads/mat_partial_conv')
    part = load_mat(PartialConv(8, 12, down=2), golden)
    x, recorded = probe.image(0, (2, 8, 24, 32)), golden['cases'][0]['outputs']
    out, mask = part(x, mat_mask(2, 24, 32))
    probe.compare(out, recorded['out'])
    probe.compare(mask, recorded['mask'])
    probe.compare(part(x)[0], recorded['unmasked'])


@torch.no_grad()
def test_mat_window_attention():
    golden = probe.load('heads/mat_window_attention')
    part = load_mat(MaskedWindowAttention(24, 6), golden)
    x, mask = probe.image(1, (8, 16, 24)), (probe.image(2, (8, 16, 1)) > 0.3).float()
    mask[3] = 0
    recorded = golden['cases'][0]['outputs']
    out, after = part(x[None], mask[None])
    probe.compare(out[0], recorded['out'])
    expected = recorded['mask'] if isinstance(recorded['mask'], list) else recorded['mask']['values']
    assert after[0, :, 0, 0].tolist() == expected and (after == after[:, :, :1]).all()
    probe.compare(part(x[None])[0][0], recorded['unmasked'])


@torch.no_grad()
def test_mat_layer():
    golden = probe.load('heads/mat_basic_layer')
    part = load_mat(MATLayer(24, 6, depth=2, window=8, size=16, down=2), golden, prefix='layer.')
    x = probe.image(3, (2, 1024, 24)).unflatten(1, (32, 32)).permute(0, 3, 1, 2)
    recorded = golden['cases'][0]['outputs']
    out, mask = part(x, mat_mask(2, 32, 32))
    probe.compare(out.flatten(2).transpose(1, 2), recorded['out'])
    probe.compare(mask.flatten(2).transpose(1, 2), recorded['mask'])
    probe.compare(part(x)[0].flatten(2).transpose(1, 2), recorded['unmasked'])


@torch.no_grad()
def test_mat_first_stage():
    golden = probe.load('heads/mat_first_stage')
    config = golden['config']
    part = load_mat(FirstStage(resolution=config['img_resolution'], dim=config['dim'], w_dim=config['w_dim']), golden)
    images = probe.image(5, (1, 3, 128, 128)).clamp(-1, 1)
    case = golden['cases'][0]
    out = part(images, mat_mask(1, 128, 128), probe.image(6, (1, 8, 64)))
    probe.compare(out, case['outputs']['out'], noise=case['sensitivity_1e6'])
