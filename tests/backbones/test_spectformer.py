"""Without this SpectFormer's stages, class block and token-label head could drift from the authors' code."""

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint

SMALL = {'depths': (1, 1, 1, 1), 'dims': (32, 64, 96, 128), 'num_heads': None, 'stem_dim': 8}


@torch.no_grad()
def test_tokens_inside():
    recorded = probe.load('spectformer_h_s')
    case = golden.case(recorded, 'logits_224')
    model, seen = golden.build('spectformer_h_s'), {}
    hooks = [
        model.stages[0][0].register_forward_hook(lambda module, inputs, out: seen.update(block1_0=out)),
        model.norm.register_forward_hook(lambda module, inputs, out: seen.update(tokens_after_norm4=out)),
    ]
    last, maps = model.forward_intermediates(probe.image(case['seed'], case['shape']), output_fmt='NHWC')
    seen.update(stage1_norm=maps[0], stage2_norm=maps[1], stage3_norm=maps[2], stage4_tokens=maps[3])
    probe.compare(model.forward_head(last), case['outputs']['logits'])
    for hook in hooks:
        hook.remove()
    assert {'logits', *seen} == case['outputs'].keys()
    for key, tokens in seen.items():
        probe.compare(tokens.flatten(1, 2) if tokens.ndim == 4 else tokens, case['outputs'][key])


@torch.no_grad()
def test_without_token_labels():
    recorded = probe.load('spectformer_h_s')
    case = golden.case(recorded, 'logits_224_no_token_label')
    state = {key: v for key, v in probe.golden_state(recorded).items() if not key.startswith('aux_head.')}
    model = load_checkpoint(golden.create('spectformer_h_s', token_label=False).eval(), state)
    probe.compare(model(probe.image(case['seed'], case['shape'])), case['outputs']['logits'])


@pytest.mark.parametrize(
    ('name', 'millions'),
    [
        ('spectformer_ti', 9.158376),  # the authors' logs
        ('spectformer_xs', 20.028520),
        ('spectformer_h_s', 22.2),
        ('spectformer_h_b', 33.1),
        ('spectformer_h_l', 54.7),
    ],
)
def test_published_sizes(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.051)


@torch.no_grad()
def test_head():
    torch.manual_seed(0)
    model = create_model('spectformer_h_s', **SMALL, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 96)
    tokens = model.norm(model.class_block(model.forward_features(x).flatten(2).transpose(1, 2)))
    expected = model.head.cls(tokens[:, 0]) + model.head.aux(tokens[:, 1:]).max(1).values / 2
    torch.testing.assert_close(model(x), expected)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), tokens[:, 0])


def test_dense_form_keeps_the_norms_between_stages():
    classifier = create_model('spectformer_h_s', **SMALL)
    dense = create_model('spectformer_h_s', **SMALL, features_only=True)
    new = dense.state_dict().keys() - classifier.state_dict().keys()
    assert new == {'output_norms.3.weight', 'output_norms.3.bias'}
    assert all(m.mean(1).abs().max() < 1e-4 for m in dense(torch.randn(1, 3, 40, 72)))


def test_mixer_in_another_family():
    model = create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), mixers='biased_attention')
    assert model(torch.randn(1, 3, 33, 65)).shape == (1, 1000)
    spectral = create_model('spectformer_h_s', **SMALL, mixers=('global_filter', 'pool', 'pool', 'global_filter'))
    assert spectral(torch.randn(1, 3, 40, 32)).shape == (1, 1000)


def test_heads_must_divide_the_channels():
    with torch.device('meta'), pytest.raises(ValueError, match=r'num_heads must divide .*got num_heads=9, dim=320'):
        create_model('spectformer_h_s', num_heads=(2, 4, 9, 14))


def test_plain_models_have_filters_first():
    with torch.device('meta'):
        blocks = create_model('spectformer_b').blocks
    assert [hasattr(block, 'filter') for block in blocks] == [True] * 4 + [False] * 15
    assert blocks[-1].attn.num_heads == 8
    small = create_model('spectformer_ti', depth=6, dim=32, num_heads=2, features_only=True, window_size=2)
    assert [block.attn.window_size for block in small.blocks[4:]] == [2, None]
    assert len(small(torch.randn(1, 3, 40, 72))) == 4
