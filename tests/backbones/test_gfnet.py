"""Without this GFNet's stages could drift from the authors' tokens, and other sizes from their way of resampling."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint

SMALL = {'depths': (1, 1, 1, 1), 'dims': (16, 24, 32, 40)}


@torch.no_grad()
def test_tokens_of_all_stages():
    recorded = probe.load('gfnet_h_ti')
    case = golden.case(recorded, 'logits_224')
    model = golden.build('gfnet_h_ti')
    maps = model.forward_intermediates(
        probe.image(case['seed'], case['shape']), output_fmt='NHWC', intermediates_only=True
    )
    stored = [value for key, value in case['outputs'].items() if key.endswith('_tokens')]
    for ours, tokens in zip(maps, stored, strict=True):
        probe.compare(ours.flatten(1, 2), tokens)


@pytest.mark.parametrize(('name', 'millions'), [('gfnet_h_ti', 15), ('gfnet_h_s', 32), ('gfnet_h_b', 54)])
def test_published_sizes(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@torch.no_grad()
def test_other_sizes_are_resampled_as_for_fine_tuning():
    torch.manual_seed(0)
    small = create_model('gfnet_h_ti', **SMALL, img_size=64, layer_scale=1.0).eval()
    large = create_model('gfnet_h_ti', **SMALL, img_size=96, layer_scale=1.0).eval()
    state = small.state_dict()
    for key, value in large.state_dict().items():
        theirs = state[key]
        if key.endswith('complex_weight'):  # (h, w, C, 2), interpolated as planes with aligned corners
            planes = theirs.flatten(2).permute(2, 0, 1)[None]
            planes = F.interpolate(planes, size=value.shape[:2], mode='bicubic', align_corners=True)
            state[key] = planes[0].permute(1, 2, 0).reshape(value.shape)
        elif key.endswith('pos_embed'):
            planes = F.interpolate(theirs.reshape(1, 16, 16, 16).permute(0, 3, 1, 2), size=(24, 24), mode='bicubic')
            state[key] = planes.flatten(2).transpose(1, 2)
    load_checkpoint(large, state)
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(small(x), large(x), rtol=1e-4, atol=1e-5)


def test_dense_form_normalises_on_request():
    raw = create_model('gfnet_h_ti', **SMALL, features_only=True)
    assert not hasattr(raw, 'output_norms')
    normed = create_model('gfnet_h_ti', **SMALL, features_only=True, output_norm='layer')
    maps = normed(torch.randn(1, 3, 40, 72))
    assert all(m.mean(1).abs().max() < 1e-4 for m in maps)


def test_no_layer_scale():
    model = create_model('gfnet_h_ti', **SMALL, layer_scale=None)
    assert not any('layer_scale' in key for key in model.state_dict())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_mixer_in_another_family():
    model = create_model('poolformer_s12', **SMALL, mixers='global_filter', features_only=True)
    assert [m.shape[1:] for m in model(torch.randn(1, 3, 33, 65))] == [(16, 9, 17), (24, 5, 9), (32, 3, 5), (40, 2, 3)]
    sized = create_model('caformer_s18', **SMALL, mixers='global_filter', img_size=(64, 96))
    assert sized.stages[1][0].token_mixer.complex_weight.shape == (8, 7, 24, 2)
