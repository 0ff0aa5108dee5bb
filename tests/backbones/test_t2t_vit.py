"""Without this T2T-ViT's random features, its soft splits or its sinusoids could drift from the published ones."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import LayerNorm
from densezoo.backbones.t2t_vit import T2TViT, TokenPerformer, TokensToToken, TokenTransformer, sinusoids, soft_split

# name -> parameters in millions; to the unit where they were counted in the authors' code, else as published
SIZES = {
    't2t_vit_7': 4.310222,
    't2t_vit_10': 5.9,
    't2t_vit_12': 6.9,
    't2t_vit_14': 21.5,
    't2t_vit_14_384': 21.7,
    't2t_vit_19': 39.2,
    't2t_vit_24': 64.1,
    't2t_vit_t_14': 21.541070,
    't2t_vit_t_19': 39.2,
    't2t_vit_t_24': 64.1,
}


@pytest.mark.parametrize('name', SIZES)
def test_sizes_of_the_paper(name):
    with torch.device('meta'):
        model = create_model(name)
    tolerance = 0.06 if SIZES[name] == round(SIZES[name], 1) else 1e-6
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=tolerance)


# ---- goldens


@pytest.fixture(scope='module')
def lively():
    """t2t_vit_7 with keys, queries and values so small that its attention between soft splits counts."""
    state = probe.golden_state(probe.load('t2t_vit_7'))
    state = {key: value * 0.2 if '.kqv.' in key else value for key, value in state.items()}
    return load_checkpoint(create_model('t2t_vit_7').eval(), state)


@pytest.mark.parametrize('case_name', ['logits_224_kqv_x0.2', 'grad_224_kqv_x0.2'])
def test_recorded_outputs_of_lively_performers(lively, case_name):
    recorded = probe.load('t2t_vit_7')
    golden.run(lively, recorded, golden.case(recorded, case_name))


@torch.no_grad()
def test_recorded_tokens_between_soft_splits(lively):
    case = golden.case(probe.load('t2t_vit_7'), 'logits_224_kqv_x0.2')
    seen = {}
    for name in ('attention1', 'attention2'):
        module = getattr(lively.patch_embed, name)
        module.register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: out}))
    seen['t2t_tokens'] = lively.patch_embed(probe.image(case['seed'], case['shape'])).flatten(1, 2)
    for name, out in seen.items():
        stored = case['outputs'][name]
        probe.compare(out, stored, 0.0, 1e-4)


def test_recorded_sinusoids():
    stored = golden.case(probe.load('t2t_vit_7'), 'init_tables')['outputs']['pos_embed_sinusoid']
    probe.compare(create_model('t2t_vit_7', depth=1).pos_embed.table.detach(), stored, 0.0, 1e-6)


# ---- parts


@pytest.mark.parametrize(('kernel', 'stride', 'padding'), [(7, 4, 2), (3, 2, 1)])
def test_soft_split_is_unfold(kernel, stride, padding):
    x = torch.randn(2, 5, 16, 24)
    ours = soft_split(x.permute(0, 2, 3, 1), kernel, stride, padding)
    expected = F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2)
    assert ours.shape[1:3] == (16 // stride, 24 // stride)
    assert torch.equal(ours.flatten(1, 2), expected)


@torch.no_grad()
def test_many_random_features_come_near_softmax():
    torch.manual_seed(0)
    attention = TokenPerformer(in_dim=8, dim=4, norm=LayerNorm, features=20000).eval()
    attention.w.normal_()
    query, key, value = torch.randn(3, 1, 50, 4) * 0.4
    exact = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    torch.testing.assert_close(attention._attend(query, key, value), exact, atol=0.01, rtol=0)


@torch.no_grad()
def test_token_transformer_scales_by_the_input():
    torch.manual_seed(0)
    block, x = TokenTransformer(in_dim=12, dim=4, norm=LayerNorm).eval(), torch.randn(2, 9, 12)
    query, key, value = block.qkv(block.norm1(x)).chunk(3, -1)
    mixed = ((query @ key.transpose(1, 2)) * 12**-0.5).softmax(-1) @ value
    expected = value + block.proj(mixed)
    torch.testing.assert_close(block(x), expected + block.mlp(block.norm2(expected)))


def test_sinusoids_of_odd_widths():
    table = sinusoids(5, 3)[0]
    assert table.shape == (5, 3) and torch.equal(table[0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(table[:, 0], torch.arange(5.0).sin())


def test_positions_are_not_trained():
    model = create_model('t2t_vit_7', **T2TViT.reduced)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {'pos_embed.table', 'patch_embed.attention1.w', 'patch_embed.attention2.w'}


def test_a_map_of_other_shape_than_square_keeps_its_rows_and_columns():
    torch.manual_seed(0)
    embed = TokensToToken(in_channels=3, dim=8, token_dim=4, tokens='performer', norm=LayerNorm).eval()
    assert embed(torch.randn(1, 3, 33, 70)).shape == (1, 3, 5, 8)


def test_unknown_tokens_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be one of performer, transformer, got 'perfomer'; did you mean"):
        create_model('t2t_vit_7', tokens='perfomer')
