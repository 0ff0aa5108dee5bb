"""Without this a backbone could drift from the published system: outputs, gradients, keys and parameter counts are
compared with what the authors' own code gave for the same deterministic weights and images."""

from functools import lru_cache

import probe
import pytest
import torch

from densezoo.backbones import create_model, list_models, load_checkpoint

NAMES = sorted(path.stem for path in probe.GOLDENS.glob('*.json') if path.stem.split('__')[0] in list_models())

CASES = [
    pytest.param(name, case['name'], id=f'{name}-{case["name"]}')
    for name in NAMES
    for case in probe.load(name)['cases']
]


@lru_cache(1)
def build(name):
    """The model with the recorded weights, dense where the recorded outputs are pyramids of the authors' dense form."""
    model = create_model(name.split('__')[0], features_only='__dense' in name).eval()
    return load_checkpoint(model, probe.golden_state(probe.load(name)))


def test_goldens_of_every_family_are_here():
    assert {name.split('_')[0] for name in NAMES} >= {
        'poolformer',
        'identityformer',
        'randformer',
        'poolformerv2',
        'convformer',
        'caformer',
    }


@pytest.mark.parametrize('name', NAMES)
def test_parameters(name):
    golden = probe.load(name)
    with torch.device('meta'):
        model = create_model(name.split('__')[0], features_only='__dense' in name)
    assert sum(p.numel() for p in model.parameters()) == golden['params']


@pytest.mark.parametrize(('name', 'case_name'), CASES)
def test_outputs(name, case_name):
    golden = probe.load(name)
    case = next(case for case in golden['cases'] if case['name'] == case_name)
    model = build(name)
    model.zero_grad(set_to_none=True)
    x = probe.image(case['seed'], case['shape']).requires_grad_(case_name.startswith('grad'))
    if case_name.startswith('grad'):
        loss = model(x).square().mean()
        loss.backward()
        names = model.convert({key: key for key in golden['state_dict']})  # ours for the authors' names
        ours_of = {theirs: ours for ours, theirs in names.items()}
        parameters = dict(model.named_parameters())
        outputs = {'loss': loss, 'grad_input': x.grad}
        for key in case['outputs'].keys() - outputs.keys():
            outputs[key] = parameters[ours_of[key.removeprefix('grad_')]].grad.reshape(case['outputs'][key]['shape'])
        relative, noise_name = 1e-3, 'fp32_vs_fp64_maxdiff_over_absmax'
    else:
        with torch.no_grad():
            if 'logits' in case['outputs']:
                outputs = {'logits': model(x)}
            else:
                maps = model(x) if model.features_only else model.forward_intermediates(x, intermediates_only=True)
                outputs = dict(zip(('c2', 'c3', 'c4', 'c5'), maps, strict=True))
        relative, noise_name = 1e-4, 'fp32_vs_fp64_maxdiff_over_std'
    assert outputs.keys() == case['outputs'].keys()
    for key, stored in case['outputs'].items():
        if not isinstance(stored, dict):
            assert outputs[key].item() == pytest.approx(stored, rel=1e-3)
            continue
        scale = stored['absmax' if 'absmax' in noise_name else 'std']
        probe.compare(outputs[key], stored, case.get(noise_name, {}).get(key, 0.0) * scale, relative)
