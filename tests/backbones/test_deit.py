"""Without this DeiT's two heads, its resizing of positions and its published weights could be misread, and parallel
blocks, the hMLP stem, class attention and talking heads drift from their papers."""

import logging

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.cait import CaiT, TalkingHeads
from densezoo.backbones.deit import DeiT
from densezoo.backbones.layers.patches import HMlpStem
from densezoo.backbones.three_things import ParallelViT, attention_only

SMALL = {**DeiT.reduced, 'num_classes': 5}


def small(name, **overrides):
    torch.manual_seed(0)
    return create_model(name, **{**SMALL, **overrides}).eval()


def image(batch=1):
    return torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(1))


# ---- goldens


@pytest.mark.parametrize(
    'stem',
    [
        'deit_tiny_patch16_224',
        'deit_tiny_distilled_patch16_224',
        pytest.param('deit_tiny_patch16_LS', marks=pytest.mark.slow),
        pytest.param('vit_tiny_paralx2_6x2_LS', marks=pytest.mark.slow),
        'cait_XXS24_224',
    ],
)
@torch.no_grad()
def test_positions_resized_as_the_authors_fine_tune(stem):
    recorded = probe.load(stem)
    case = golden.case(recorded, 'logits_256_resized_pos_embed')
    model = golden.build(stem)  # of 224: positions are resized at run time
    golden.run(model, recorded, case)
    reloaded = load_checkpoint(golden.create(stem, img_size=256).eval(), probe.golden_state(recorded))
    probe.compare(reloaded.pos_embed.table, case['outputs']['pos_embed_resized'])


@torch.no_grad()
@pytest.mark.parametrize('stem', ['deit_tiny_distilled_patch16_224', 'cait_XXS24_224'])
def test_recorded_tokens_and_heads(stem):
    recorded = probe.load(stem)
    case = golden.case(recorded, 'logits_224')
    model = golden.build(stem)
    tokens = model.forward_features(probe.image(case['seed'], case['shape']))
    probe.compare(tokens, case['outputs']['tokens_after_norm'])
    if stem.startswith('deit'):
        probe.compare(model.head.fc(tokens[:, 0]), case['outputs']['head_cls_out'])
        probe.compare(model.head.fc_dist(tokens[:, 1]), case['outputs']['head_dist_out'])


def test_gradient_of_one_image_through_the_hmlp_stem():
    """The recorded gradient met PyTorch's error (batch norm in evaluation, one image, transposed gradients): ours must
    not depend on the batch. What comes before the stem in the backward pass was recorded rightly."""
    torch.manual_seed(0)
    stem = HMlpStem(3, 16).eval()
    for norm in (stem.proj[1], stem.proj[4], stem.proj[7]):
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(2, 3, 32, 48).requires_grad_()
    (together,) = torch.autograd.grad(stem(x).square().sum(), x)
    alone = [torch.autograd.grad(stem(x[i : i + 1]).square().sum(), x)[0][i] for i in range(2)]
    torch.testing.assert_close(torch.stack(alone), together)
    recorded = probe.load('vit_tiny_hmlp_stem_d4')
    case = golden.case(recorded, 'grad_224')
    model = golden.build('vit_tiny_hmlp_stem_d4')
    loss = model(probe.image(case['seed'], case['shape'])).square().mean()
    loss.backward()
    stored = case['outputs']['grad_blocks.3.mlp.fc1.weight']
    probe.compare(model.blocks[3].mlp.fc1.weight.grad, stored, relative=1e-3)


# ---- distillation


def test_pair_of_logits_while_training():
    model = small('deit_tiny_distilled_patch16_224')
    model.set_distilled_training()
    mean = model(image())
    logits, distilled = model.train()(image())
    torch.testing.assert_close((logits + distilled) / 2, mean)
    model.set_distilled_training(False)
    torch.testing.assert_close(model(image()), mean)
    with pytest.raises(ValueError, match='set_distilled_training needs a distilled classifier'):
        small('deit_tiny_patch16_224').set_distilled_training()


@torch.no_grad()
def test_distilled_weights_into_an_undistilled_model(caplog):
    distilled, plain = small('deit_tiny_distilled_patch16_224'), small('deit_tiny_patch16_224')
    with caplog.at_level(logging.INFO, 'densezoo'):
        load_checkpoint(plain, distilled.state_dict())
    assert [record.getMessage() for record in caplog.records] == [
        'distilled weights into an undistilled model: left out dist_token, head.fc_dist.weight, head.fc_dist.bias'
    ]
    assert torch.equal(plain.head.weight, distilled.head.fc.weight)
    table = distilled.pos_embed.table
    assert torch.equal(plain.pos_embed.table, torch.cat((table[:, :1], table[:, 2:]), 1))


@pytest.mark.parametrize('features_only', [False, True])
def test_undistilled_weights_into_a_distilled_model(features_only):
    model = small('deit_tiny_distilled_patch16_224', features_only=features_only)
    with pytest.raises(ValueError, match='the weights are of an undistilled model, which has neither dist_token') as e:
        load_checkpoint(model, small('deit_tiny_patch16_224').state_dict())
    assert '\n' not in str(e.value)


def test_other_classes_for_both_heads(caplog):
    model = small('deit_tiny_distilled_patch16_224', num_classes=4)
    with caplog.at_level(logging.INFO, 'densezoo'):
        load_checkpoint(model, small('deit_tiny_distilled_patch16_224').state_dict())
    assert 'head.fc not loaded: 5 classes instead of 4; head.fc_dist not loaded: 5' in caplog.text


# ---- three things


@torch.no_grad()
def test_one_branch_is_an_ordinary_block():
    parallel, plain = small('vit_tiny_paralx2_6x2', parallel=1), small('deit_tiny_patch16_ls', layer_scale=None)
    authors = {
        key.replace('pos_embed.table', 'pos_embed').replace('.conv.', '.proj.'): value
        for key, value in plain.state_dict().items()
    }
    load_checkpoint(parallel, authors)
    torch.testing.assert_close(parallel(image()), plain(image()))


@torch.no_grad()
def test_the_hmlp_stem_never_looks_beyond_a_patch():
    stem = HMlpStem(3, 16).eval()
    x = image()
    moved = x.clone()
    moved[..., 16:32, 32:48] += 1
    changed = (stem(x) - stem(moved)).abs().amax(-1)[0] > 0
    assert changed.nonzero().tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"stem='hmlp' has patches of 16 pixels, got patch_size=8"):
        small('vit_tiny_hmlp_stem_d4', patch_size=8)
    with pytest.raises(ValueError, match='the hMLP stem needs dim divisible by 4'):
        HMlpStem(3, 6)


@pytest.mark.parametrize('cls', [DeiT, ParallelViT, CaiT])
def test_attention_only(cls):
    model = cls(**SMALL)
    chosen = attention_only(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == chosen and {'head.weight', 'pos_embed.table'} < set(chosen)
    assert any(name.endswith('qkv.weight') for name in chosen)
    assert not [name for name in chosen if any(part in name for part in ('mlp', 'norm', 'patch_embed'))]
    with pytest.raises(ValueError, match='attention_only needs modules called attn, Linear has none'):
        attention_only(torch.nn.Linear(2, 2))


def test_no_branches():
    with pytest.raises(ValueError, match='parallel must be positive, got parallel=0'):
        small('vit_tiny_paralx2_6x2', parallel=0)


# ---- CaiT


@torch.no_grad()
def test_talking_heads_that_do_not_talk_are_attention():
    torch.manual_seed(0)
    heads = TalkingHeads(dim=8, num_heads=2)
    x, bias = torch.randn(2, 6, 8), torch.randn(2, 1, 1, 6)
    for linear in (heads.proj_l, heads.proj_w):
        linear.weight.copy_(torch.eye(2))
        linear.bias.zero_()
    plain = create_model('deit_tiny_patch16_224', depth=1, dim=8, num_heads=2).blocks[0].attn
    plain.load_state_dict({key: value for key, value in heads.state_dict().items() if not key.startswith('proj_')})
    torch.testing.assert_close(heads(x, (2, 3), bias), plain(x, (2, 3), bias))
    heads.proj_w.weight.copy_(torch.eye(2).flip(0))  # head 0 now reads the values of its own with weights of head 1
    assert not torch.allclose(heads(x, (2, 3)), plain(x, (2, 3)))


def test_windows_are_refused_by_talking_heads():
    with pytest.raises(ValueError, match=r'talking heads take no windows, got window_size=2; pass token_mixer='):
        small('cait_xxs24_224', window_size=2)
    small('cait_xxs24_224', window_size=2, token_mixer='attention', features_only=True)(image())
