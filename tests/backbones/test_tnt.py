"""Without this TNT's words could see beyond their patch, lose their patch, or drift from the published system."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import norm_factory
from densezoo.backbones.tnt import TNT, Gate, SplitAttention, WordEmbed


def small(**arguments):
    torch.manual_seed(0)
    return create_model('tnt_s_patch16_224', **{**TNT.reduced, 'num_classes': 7, **arguments}).eval()


# ---- goldens


@pytest.fixture(scope='module')
def gated():
    """The small instance with squeeze and excitation that no published name has."""
    recorded = probe.load('tnt_mini_se_96')
    model = TNT(
        depth=3, dim=192, num_heads=3, inner_dim=12, inner_heads=2, se=True, img_size=96, num_classes=100
    ).eval()
    assert sum(p.numel() for p in model.parameters()) == recorded['params']
    return load_checkpoint(model, probe.golden_state(recorded))


@pytest.mark.parametrize('case_name', ['logits_96', 'grad_96'])
def test_recorded_outputs_with_squeeze_and_excitation(gated, case_name):
    recorded = probe.load('tnt_mini_se_96')
    golden.run(gated, recorded, golden.case(recorded, case_name))


@torch.no_grad()
def test_recorded_tokens(gated):
    case = golden.case(probe.load('tnt_mini_se_96'), 'logits_96')
    stored = case['outputs']['tokens_after_norm']
    probe.compare(gated.forward_features(probe.image(case['seed'], case['shape'])), stored, 0.0, 1e-4)


@torch.no_grad()
def test_recorded_words():
    recorded = probe.load('tnt_s_patch16_224')
    case, state = golden.case(recorded, 'logits_224'), probe.golden_state(recorded)
    embed = WordEmbed(3, 24, patch_size=16)
    embed.proj.load_state_dict({key: state[f'patch_embed.proj.{key}'] for key in ('weight', 'bias')})
    words = embed(probe.image(case['seed'], case['shape']))[0]
    probe.compare(words, case['outputs']['words_after_stem'], 0.0, 1e-4)


# ---- parts


@torch.no_grad()
def test_words_do_not_see_beyond_their_patch():
    torch.manual_seed(0)
    embed, x = WordEmbed(3, 5, patch_size=16), torch.randn(2, 3, 32, 48)
    words, grid = embed(x)
    assert grid == (2, 3) and words.shape == (2 * 6, 16, 5)
    x[:, :, 16:, 16:32] += 1.0  # the fifth of six patches
    changed = (embed(x)[0] != words).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [4, 10]
    alone = embed(x[1:, :, :16, 32:])[0]  # the third patch of the second image
    torch.testing.assert_close(alone[0], words[6 + 2])
    row_major = embed.proj(x[1:, :, :16, 32:])[0].flatten(1).T
    torch.testing.assert_close(row_major, words[6 + 2])


@torch.no_grad()
def test_attention_by_its_formula():
    torch.manual_seed(0)
    attention, x = SplitAttention(dim=12, num_heads=3), torch.randn(2, 5, 12)
    out = []
    for h in range(3):
        rows = slice(4 * h, 4 * h + 4)
        query, key = x @ attention.qk.weight[:12][rows].T, x @ attention.qk.weight[12:][rows].T
        out.append((query @ key.transpose(1, 2) * 4**-0.5).softmax(-1) @ (x @ attention.v.weight[rows].T))
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(out, -1)))


@torch.no_grad()
def test_windows_as_large_as_the_grid_differ_by_the_class_token_alone():
    torch.manual_seed(0)
    windowed, x = SplitAttention(dim=8, num_heads=2, window_size=4), torch.randn(2, 1 + 12, 8)
    everywhere = SplitAttention(dim=8, num_heads=2)
    everywhere.load_state_dict(windowed.state_dict())
    ours = windowed(x, (3, 4))
    torch.testing.assert_close(ours[:, :1], everywhere(x)[:, :1])
    torch.testing.assert_close(ours[:, 1:], everywhere(x[:, 1:]))


@torch.no_grad()
def test_gate():
    torch.manual_seed(0)
    gate, x = Gate(8, norm=norm_factory('layer_eps5')), torch.randn(2, 5, 8)
    mean = F.layer_norm(x.mean(1), (8,), gate.fc[0].weight, gate.fc[0].bias, 1e-5)
    scale = torch.tanh(gate.fc[3](F.relu(gate.fc[1](mean))))
    torch.testing.assert_close(gate(x), x * (1 + scale[:, None]))


# ---- the model


@torch.no_grad()
def test_words_flow_from_block_to_block_and_reach_the_class_token():
    model, x = small(depth=2), torch.randn(1, 3, 32, 32)
    before = model(x)
    for block in model.blocks:  # patches get nothing from words but through these
        block.proj_norm2.weight.zero_()
    deaf = model(x)
    model.blocks[0].inner_mlp.fc2.bias.add_(1.0)
    assert torch.equal(model(x), deaf) and not torch.allclose(deaf, before)
    model.blocks[1].proj_norm2.weight.fill_(1.0)
    hearing = model(x)
    model.blocks[0].inner_mlp.fc2.bias[0] -= 3.0
    assert not torch.allclose(model(x), hearing)


def test_weights_for_another_image_size(caplog):
    state = small(img_size=64).state_dict()
    with caplog.at_level('INFO', 'densezoo'):
        model = load_checkpoint(small(img_size=(96, 128)), {'outer_pos': state.pop('pos_embed.table'), **state})
    assert model.pos_embed.table.shape[1] == 1 + 6 * 8 and model.outer_tokens.shape[1] == 6 * 8
    assert 'resampled from a grid' in caplog.text


def test_frozen_and_undecayed_parameters():
    model = small()
    assert [key for key, parameter in model.named_parameters() if not parameter.requires_grad] == ['outer_tokens']
    assert model.no_weight_decay() == {'cls_token', 'pos_embed.table', 'inner_pos'}


def test_mean_and_deviation_are_a_half():
    cfg = small().default_cfg
    assert tuple(cfg['mean']) == tuple(cfg['std']) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'patch_size': 14}, 'patch_size must be a multiple of 4, got patch_size=14'),
        ({'inner_heads': 3}, 'num_heads must divide dim, got num_heads=3, dim=8'),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
