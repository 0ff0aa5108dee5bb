"""Without this SLAB's DeiTs could drift from the authors' code, lose their merging for deployment, or refuse weights of
another image size; and mixers of maps could not be used in plain backbones."""

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import MapMixer, build_mixer, build_token_mixer
from densezoo.backbones.layers.fold_norm import Affine
from densezoo.backbones.layers.rep_norm import PRepBN, RepBN
from densezoo.deploy import fuse_for_deploy

SMALL = {'depth': 2, 'dim': 32, 'num_heads': 2, 'num_classes': 5}


def small(name='slab_deit_tiny', **overrides):
    """With norms that have seen data."""
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, **overrides}).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and value.ndim <= 1:
                value.copy_(torch.rand_like(value) * 0.3 + (0.2 if 'weight' in key or 'var' in key else 0))
            elif 'positional' in key:
                value.normal_()
    return model


def image(height=72, width=100):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize('name', ['deit_tiny_prepbn', 'slab_deit_tiny'])
def test_recorded_tokens(name):
    recorded = probe.load(name)
    case = golden.case(recorded, 'tokens_224')
    probe.compare(
        golden.build(name).forward_features(probe.image(case['seed'], case['shape'])), case['outputs']['tokens']
    )


@pytest.mark.parametrize(
    ('name', 'millions', 'norm', 'class_token'),
    [
        ('deit_tiny_prepbn', 5.7, RepBN, True),
        ('deit_small_prepbn', 22.1, PRepBN, True),
        ('slab_deit_tiny', 6.2, PRepBN, False),
        ('slab_deit_small', 23.0, PRepBN, False),
    ],
)
def test_published_models(name, millions, norm, class_token):
    with torch.device('meta'):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.051)
    assert {type(m) for m in model.modules() if isinstance(m, RepBN)} == {norm}
    assert (model.num_prefix_tokens == 1) == class_token == model.cls_token.requires_grad
    assert model.pooling == ('token' if class_token else 'avg')


@torch.no_grad()
@pytest.mark.parametrize('name', ['deit_tiny_prepbn', 'slab_deit_tiny'])
@pytest.mark.parametrize('features_only', [False, True])
def test_merging_for_deployment_changes_nothing(name, features_only):
    model, x = small(name, features_only=features_only), image()
    merged = fuse_for_deploy(model)
    left = [key for key, module in merged.named_modules() if isinstance(module, RepBN | Affine)]
    assert left in ([], ['norm'])
    ours, expected = (m(x) if features_only else [m(x)] for m in (merged, model))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


@torch.no_grad()
def test_weights_of_another_size(caplog):
    model = small(img_size=96)
    other = load_checkpoint(small(img_size=(64, 128)), model.state_dict())
    assert other.blocks[0].attn.mixer.positional_encoding.shape == (1, 4 * 8, 32)
    torch.testing.assert_close(other(image(64, 128)), model(image(64, 128)))


@torch.no_grad()
@pytest.mark.parametrize('name', ['pool', 'sla', 'global_filter', 'biased_attention', 'identity'])
def test_mixers_of_maps_in_a_plain_model(name):
    torch.manual_seed(0)
    mixer = MapMixer(dim=32, mixer=name, num_heads=4)
    torch.manual_seed(0)
    of_maps = build_mixer(dict(name=name, num_heads=4) if name in ('sla', 'biased_attention') else name, dim=32)
    x = torch.randn(2, 3, 5, 32)
    torch.testing.assert_close(mixer(x.flatten(1, 2), (3, 5)), of_maps(x).flatten(1, 2))
    model = create_model('deit_tiny_patch16_224', **SMALL, class_token=False, token_mixer=dict(name='map', mixer=name))
    assert model(image()).shape == (2, 5)


def test_what_mixers_of_maps_refuse():
    with pytest.raises(ValueError, match='mixers of maps take neither prefix tokens nor window_size, got prefix=1'):
        small('deit_tiny_patch16_224', token_mixer='map')
    with pytest.raises(ValueError, match='got prefix=0, window_size=7; pass class_token=False'):
        small('slab_deit_tiny', window_size=7, global_blocks=())
    with pytest.raises(ValueError, match=r"mixer must be one of .*got 'poool'; did you mean pool"):
        build_token_mixer(dict(name='map', mixer='poool'), dim=8)
    with pytest.raises(TypeError, match="mixer 'pool' has no option 'size'"):
        build_token_mixer(dict(name='map', mixer=dict(name='pool', size=3)), dim=8)
    with pytest.raises(
        ValueError, match='a distilled model needs its class token, got distilled=True, class_token=False'
    ):
        small('deit_tiny_patch16_224', distilled=True, class_token=False)
    folded = MapMixer(dim=8, mixer=dict(name='sla', num_heads=2))
    windows = MapMixer(dim=8, mixer=dict(name='sla', num_heads=2, window_size=2))
    assert folded.first_linears == ('mixer.qkv',) and windows.first_linears == ()
