"""Without this PyramidTNT's words could be laid out wrongly, biases misplaced, or a border averaged with padding."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import LayerNorm
from densezoo.backbones.pyramid_tnt import Merge, PairTable, PyramidTNT, ReducedAttention, Stem, average

# name -> published parameters in millions
SIZES = {
    'ptnt_ti_patch16_192': 10.578529,
    'ptnt_s_patch16_256': 32,
    'ptnt_m_patch16_256': 85,
    'ptnt_b_patch16_256': 157,
}


@pytest.mark.parametrize('name', SIZES)
def test_sizes_of_the_paper(name):
    with torch.device('meta'):
        model = create_model(name)
    tolerance = 1e-6 if isinstance(SIZES[name], float) else 0.06
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=tolerance)


def small(**arguments):
    torch.manual_seed(0)
    return create_model('ptnt_ti_patch16_192', **{**PyramidTNT.reduced, 'num_classes': 7, **arguments}).eval()


@torch.no_grad()
def test_recorded_words_and_sentences():
    recorded = probe.load('ptnt_ti_patch16_192')
    case, model, seen = golden.case(recorded, 'logits_192'), golden.build('ptnt_ti_patch16_192'), {}
    hooks = [
        blocks[-1].register_forward_hook(lambda module, inputs, out, s=s: seen.update({s: out}))
        for s, blocks in enumerate(model.stages, 1)
    ]
    model(probe.image(case['seed'], case['shape']))
    for hook in hooks:
        hook.remove()
    for s, (sentences, words) in seen.items():
        probe.compare(sentences.flatten(1, 2), case['outputs'][f'stage{s}_sentences'], 0.0, 1e-4)
        probe.compare(words.flatten(0, 2), case['outputs'][f'stage{s}_words'], 0.0, 1e-4)
    assert len(seen) == 4


# ---- parts


@pytest.mark.parametrize('grid', [(8, 4), (16, 8), (5, 7)])
def test_biases_are_resized_along_both_maps(grid):
    module = PairTable(2, (8, 4), 2).requires_grad_(False)
    keys = (-(-grid[0] // 2), -(-grid[1] // 2))
    pairs = module.table.reshape(1, 2 * 8 * 4, 4, 2)  # every query's map of keys, then every key's map of queries
    pairs = F.interpolate(pairs, keys, mode='bicubic').reshape(2, 32, -1).transpose(1, 2).reshape(1, -1, 8, 4)
    pairs = F.interpolate(pairs, grid, mode='bicubic').reshape(2, keys[0] * keys[1], -1).transpose(1, 2)
    torch.testing.assert_close(module(grid), pairs[None])


def test_biases_are_resized_on_loading():
    source, target = PairTable(2, (8, 8), 4), PairTable(2, (12, 6), 4)
    state = {'p.table': source.table.detach()}
    target.resample(state, 'p.')
    torch.testing.assert_close(state['p.table'], source((12, 6)))
    assert state['p.table'].shape == target.table.shape
    untouched = {'p.table': torch.zeros(1, 2, 64, 5)}  # keys of another reduction: an error of shapes follows
    target.resample(untouched, 'p.')
    assert untouched['p.table'].shape == (1, 2, 64, 5)


def test_average():
    x = torch.randn(2, 8, 12, 3)
    torch.testing.assert_close(average(x, 4).permute(0, 3, 1, 2), F.avg_pool2d(x.permute(0, 3, 1, 2), 4))
    ours = average(x[:, :7, :9], 4)
    assert ours.shape == (2, 2, 3, 3)
    torch.testing.assert_close(ours[:, 1, 2], x[:, 4:7, 8].mean(1))


@torch.no_grad()
def test_attention_by_its_formula():
    torch.manual_seed(0)
    attention, x = ReducedAttention(dim=8, num_heads=2, norm=LayerNorm, sr_ratio=2).eval(), torch.randn(1, 4, 6, 8)
    bias = torch.randn(1, 2, 24, 6)
    source = attention.norm(attention.linear(F.avg_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)))
    query, (key, value) = attention.q(x.flatten(1, 2)), attention.kv(source).chunk(2, -1)
    out = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        logits = query[..., part] @ key[..., part].transpose(1, 2) * 4**-0.5 + bias[:, h]
        out.append(logits.softmax(-1) @ value[..., part])
    torch.testing.assert_close(attention(x, bias), attention.proj(torch.cat(out, -1)).reshape(x.shape))


@torch.no_grad()
def test_words_lie_as_in_the_image():
    """Words of neighbouring sentences are neighbours: merging them is one convolution over the whole map, but for the
    borders of 8 x 8 words."""
    torch.manual_seed(0)
    merge = Merge(4, 6, 3, 5, norm=LayerNorm, pairs=PairTable(1, (2, 2), 1)).eval()
    image = torch.randn(1, 16, 16, 3)  # words of 4 x 4 sentences
    words = image.reshape(1, 4, 4, 4, 4, 3).transpose(2, 3).flatten(3, 4)
    _, merged, bias = merge((torch.randn(1, 4, 4, 4), words))
    assert merged.shape == (1, 2, 2, 16, 5) and torch.equal(bias, merge.pairs.table)
    whole = merge.word_conv(merge.word_norm(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    ours = merged.unflatten(3, (4, 4)).transpose(2, 3).reshape(1, 8, 8, 5)
    inside = [0, 1, 2, 3, 5, 6, 7]  # row and column 4 look back over a border
    torch.testing.assert_close(ours[:, inside][:, :, inside], whole[:, inside][:, :, inside])


@torch.no_grad()
def test_stem_cuts_words_of_every_sentence():
    torch.manual_seed(0)
    stem = Stem(3, 8, 2, grid=(3, 5), pairs=PairTable(1, (3, 5), 1)).eval()
    x = torch.randn(2, 3, 24, 40)
    _, words, _ = stem(x)
    flat = stem.inner_convs(stem.common_conv(x))  # (B, 2, 12, 20)
    unfolded = F.unfold(flat, 4, stride=4).transpose(1, 2).reshape(2, 3, 5, 2, 16).transpose(3, 4)
    torch.testing.assert_close(words, unfolded + stem.inner_pos)
    assert stem(x[:, :, :23, :33])[1].shape == (2, 3, 5, 16, 2)


# ---- the model


def test_words_take_part_in_the_first_blocks():
    with torch.device('meta'):
        model = create_model('ptnt_s_patch16_256')
    inner = [[block.inner is not None for block in blocks] for blocks in model.stages]
    assert inner == [[True, False], [True, True, *[False] * 6], [True, *[False] * 3], [True, False]]


@torch.no_grad()
def test_dense_form():
    dense, classifier = small(features_only=True), small()
    load_checkpoint(dense, classifier.state_dict())
    x = torch.randn(1, 3, 64, 96)
    maps, raw = dense(x), classifier.forward_intermediates(x, intermediates_only=True)
    assert len(raw) == 4 and classifier.feature_info.reduction() == [8, 16, 32, 64]
    for ours, theirs in zip(maps[1:], raw[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert maps[0].shape == (1, 8, 16, 24) and len(dense.stages) == 3
    assert small(features_only=True, out_indices=(1,)).feature_info.reduction() == [8]


def test_weights_for_another_image_size():
    state = small(img_size=128).state_dict()
    model = load_checkpoint(small(img_size=(64, 96)), state)
    assert model.downsample_layers[0].pairs.table.shape == (1, 1, 8 * 12, 2 * 3)
    assert model.downsample_layers[3].pairs.table.shape == (1, 2, 1 * 2, 1 * 2)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='num_heads must divide dim, got num_heads=3, dim=16'):
        small(num_heads=(3, 2, 2, 2))
