"""Without this GFNet's stages could drift from the authors' tokens, and other sizes from their way of resampling."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.gfnet import GFNetBlock
from densezoo.backbones.layers import LayerNorm

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


@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('gfnet_ti', 7.5),
        ('gfnet_xs', 16),
        ('gfnet_s', 25),
        ('gfnet_b', 43),
        ('gfnet_h_ti', 15),
        ('gfnet_h_s', 32),
        ('gfnet_h_b', 54),
    ],
)
def test_published_sizes(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) <= 0.51


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


# ---- plain models


PLAIN = {'depth': 3, 'dim': 32, 'num_heads': 2, 'num_classes': 5}


@torch.no_grad()
def test_plain_models_take_weights_of_another_size():
    torch.manual_seed(0)
    model = create_model('gfnet_ti', **PLAIN, img_size=128).eval()
    other = load_checkpoint(create_model('gfnet_ti', **PLAIN, img_size=(96, 160)).eval(), model.state_dict())
    assert other.blocks[0].filter.complex_weight.shape == (6, 6, 32, 2)
    x = torch.randn(2, 3, 96, 160)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-6)
    theirs = model.blocks[0].filter.complex_weight.flatten(2).permute(2, 0, 1)[None]
    theirs = F.interpolate(theirs, size=(6, 6), mode='bicubic', align_corners=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(other.blocks[0].filter.complex_weight, theirs.reshape(6, 6, 32, 2))


@torch.no_grad()
def test_plain_models_pool_the_normed_tokens():
    model = create_model('gfnet_ti', **PLAIN).eval()
    tokens = model.forward_features(torch.randn(1, 3, 40, 72))
    assert tokens.shape == (1, 3 * 5, 32)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 15), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1))


@torch.no_grad()
def test_tokens_and_maps_are_filtered_alike():
    torch.manual_seed(0)
    block = GFNetBlock(dim=8, grid=(3, 5), norm=LayerNorm, mlp_ratio=2.0, layer_scale=None, drop_path=0.0)
    x = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(block(x.flatten(1, 2), (3, 5)), block(x).flatten(1, 2))


def test_number_of_filter_blocks():
    blocks = create_model('gfnet_ti', **PLAIN, filter_blocks=2).blocks
    assert [hasattr(block, 'filter') for block in blocks] == [True, True, False]
    assert [hasattr(block, 'filter') for block in create_model('gfnet_ti', **PLAIN).blocks] == [True] * 3
    with pytest.raises(ValueError, match='filter_blocks must not be negative, got filter_blocks=-1'):
        create_model('gfnet_ti', **PLAIN, filter_blocks=-1)
