"""Without this positions of plain backbones could be resized wrongly, pyramids drop borders, windows see too much, and
options of attention change what they should not. What every backbone must do is in test_contract.py."""

import logging

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import TokenAttention, build_token_mixer
from densezoo.backbones.layers.positions import PositionTable
from densezoo.backbones.layers.pyramid import PyramidLevel, max_pool, pyramid_strides
from densezoo.backbones.layers.resize import METHODS, resize_table
from densezoo.backbones.layers.token_attention import ClippedSoftmax
from densezoo.backbones.plain import block_windows
from densezoo.deploy import export_program

SMALL = {'depth': 3, 'dim': 32, 'num_heads': 2, 'num_classes': 5}


def small(**overrides):
    torch.manual_seed(0)
    return create_model('deit_tiny_patch16_224', **{**SMALL, **overrides}).eval()


def image(height=64, width=96, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- positions


@pytest.mark.parametrize('size', [(1, 1), (7, 30), (16, 16), (20, 5)])
@pytest.mark.parametrize('method', METHODS)
def test_resizing_is_interpolation(method, size):
    table = torch.randn(14, 9, 4, generator=torch.Generator().manual_seed(0))
    mode, antialias = method.removesuffix('_antialias'), method.endswith('_antialias')
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=size, mode=mode, antialias=antialias)[0]
    torch.testing.assert_close(resize_table(table, size, method), expected.permute(1, 2, 0), rtol=0, atol=1e-5)


def test_positions_of_prefix_tokens_are_not_resized():
    table = PositionTable(8, (4, 4), prefix=2)
    torch.nn.init.normal_(table.table)
    prefix, positions = table((4, 4))
    again, resized = table((3, 7))
    assert torch.equal(prefix, again) and positions.shape == (1, 16, 8) and resized.shape == (1, 21, 8)
    with pytest.raises(ValueError, match='method must be one of bicubic_antialias, bicubic, bilinear'):
        PositionTable(8, (4, 4), method='area')


@torch.no_grad()
def test_resizing_at_load_time_is_resizing_at_run_time(caplog):
    model, other = small(), small(img_size=(96, 160))
    with caplog.at_level(logging.INFO, 'densezoo'):
        load_checkpoint(other, model.state_dict())
    assert [record.getMessage() for record in caplog.records] == [
        'pos_embed.table resampled from a grid of 14 x 14 to 6 x 10'
    ]
    x = image(96, 160)
    torch.testing.assert_close(other(x), model(x))
    caplog.clear()
    with caplog.at_level(logging.INFO, 'densezoo'):
        load_checkpoint(small(), model.state_dict())
    assert not caplog.records


def test_tables_that_are_no_square_are_refused():
    state = small().state_dict()
    state['pos_embed.table'] = state['pos_embed.table'][:, :-3]
    with pytest.raises(ValueError, match=r'pos_embed\.table has 194 rows, expected 1 of prefix tokens and a square'):
        load_checkpoint(small(), state)


@torch.no_grad()
def test_a_program_of_one_size_holds_no_resize():
    """TensorRT refuses antialiased Resize; matrices of constants fold."""
    model = small(features_only=True)
    program = export_program(model, image(72, 100), dynamic_batch=False)
    operators = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert operators and not [name for name in operators if 'upsample' in name or 'interpolate' in name]
    for ours, expected in zip(program.module()(image(72, 100)), model(image(72, 100)), strict=True):
        torch.testing.assert_close(ours, expected)


# ---- any size, pyramid


@torch.no_grad()
def test_images_are_padded_to_whole_patches():
    model = small()
    torch.testing.assert_close(model(image(50, 70)), model(F.pad(image(50, 70), (0, 10, 0, 14))))


@torch.no_grad()
@pytest.mark.parametrize('patch_size', [2, 4, 8, 14, 16, 32])
@pytest.mark.parametrize('pyramid_dim', [None, 24])
def test_pyramids_of_other_patches(patch_size, pyramid_dim):
    model = small(features_only=True, patch_size=patch_size, img_size=32, pyramid_dim=pyramid_dim, depth=1)
    strides = (7, 14, 28, 56) if patch_size == 14 else (4, 8, 16, 32)
    assert tuple(model.feature_info.reduction()) == strides == pyramid_strides(patch_size)
    maps = model(image(45, 38))
    assert [m.shape[2:] for m in maps] == [(-(-45 // s), -(-38 // s)) for s in strides]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert pyramid_dim is None or set(model.feature_info.channels()) == {pyramid_dim}


@torch.no_grad()
@pytest.mark.parametrize('blocks', [(0, 1, 1, 2), (-3, -3, 0, 1)])
@pytest.mark.parametrize('reduction', [None, {'type': 'tome', 'r': 2}])
def test_levels_of_the_pyramid_from_several_blocks(blocks, reduction):
    """Each level is made from the map after its block; alone too, and without the blocks that nothing reads."""
    options = {'features_only': True, 'reduction': reduction}
    model, x = small(**options, pyramid_blocks=blocks), image(50, 70)
    maps, found = model(x), model.forward_intermediates(x, intermediates_only=True)
    for i, level in enumerate(maps):
        expected = model.pyramid[str(i)](found[blocks[i]].permute(0, 2, 3, 1), level.shape[2:])
        torch.testing.assert_close(level, expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    alone = small(**options, pyramid_blocks=blocks, out_indices=(1,))
    alone.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(alone(x)[0], maps[1])
    last = small(**options, pyramid_blocks=(2, -1, 2, 2))
    for ours, theirs in zip(last(x), small(**options)(x), strict=True):
        assert torch.equal(ours, theirs)


def test_blocks_of_the_pyramid_that_are_none():
    for blocks in ((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 'last')):
        with pytest.raises(ValueError, match=r'pyramid_blocks must be 4 blocks, one for each level, from 0 to 2, got '):
            small(features_only=True, pyramid_blocks=blocks)


def test_strides_that_do_not_fit():
    with pytest.raises(ValueError, match='even number of pixels, got 7'):
        pyramid_strides(7)
    with pytest.raises(ValueError, match='target must be stride times or divided by a power of two, got target=12'):
        PyramidLevel(8, stride=16, target=12)


@pytest.mark.parametrize('size', [(1, 1), (5, 4), (6, 9)])
def test_max_pooling_keeps_the_border(size):
    x = torch.randn(2, *size, 3, generator=torch.Generator().manual_seed(0))
    expected = F.max_pool2d(x.permute(0, 3, 1, 2), 2, 2, ceil_mode=True).permute(0, 2, 3, 1)
    assert torch.equal(max_pool(x, 2), expected)


# ---- windows


def test_four_global_blocks_by_default():
    assert block_windows(12, 7) == [7, 7, None] * 4
    assert block_windows(3, None) == [None] * 3 and block_windows(3, 5, (0, -1)) == [None, 5, None]
    with pytest.raises(ValueError, match=r'global_blocks must be block numbers from 0 to 2, got \(3,\)'):
        block_windows(3, 7, (3,))


@torch.no_grad()
def test_patches_see_their_window_alone_and_prefix_tokens_see_all():
    torch.manual_seed(0)
    attention = TokenAttention(dim=8, num_heads=2, prefix=1, window_size=2)
    x = torch.randn(1, 1 + 12, 8)
    moved = x.clone()
    moved[:, 1] += 1  # the patch at (0, 0) of a grid of 3 x 4
    changed = (attention(x, (3, 4)) - attention(moved, (3, 4))).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 5, 6]
    whole = TokenAttention(dim=8, num_heads=2, prefix=1)
    whole.load_state_dict(attention.state_dict())
    torch.testing.assert_close(attention(x, (3, 4))[:, 0], whole(x, (3, 4))[:, 0])
    with pytest.raises(ValueError, match='windows take no bias'):
        attention(x, (3, 4), torch.zeros(1, 1, 1, 13))


@torch.no_grad()
def test_windows_export_with_dynamic_sizes():
    model = small(features_only=True, window_size=2, global_blocks=(1,), depth=2, out_indices=(2,))
    assert [block.attn.window_size for block in model.blocks] == [2, None]
    program = export_program(model, image(64, 96), dynamic_batch=True, dynamic_size=True).module()
    for size in ((33, 65), (100, 140)):
        for ours, expected in zip(program(image(*size, 3)), model(image(*size, 3)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


# ---- options of attention


def attention_and_tokens(**options):
    torch.manual_seed(0)
    return TokenAttention(dim=8, num_heads=2, prefix=1, **options).eval(), torch.randn(3, 10, 8)


@torch.no_grad()
def test_clipped_softmax():
    logits = torch.tensor([[4.0, 0.0, -4.0]])
    plain = logits.softmax(-1)
    assert torch.equal(ClippedSoftmax(0.0, 1.0)(logits), plain)
    clipped = ClippedSoftmax(-0.1, 1.2)(logits)
    torch.testing.assert_close(clipped, (plain * 1.3 - 0.1).clamp(0, 1))
    assert clipped[0, 0] == 1 and clipped[0, 2] == 0
    torch.testing.assert_close(ClippedSoftmax(alpha=0.3)(logits), (plain * 1.1 - 0.1).clamp(0, 1))
    with pytest.raises(ValueError, match='gamma must be <= 0'):
        ClippedSoftmax(0.1)


@torch.no_grad()
def test_explicit_softmax_equals_fused_attention():
    fused, x = attention_and_tokens()
    explicit, _ = attention_and_tokens(clip=dict(gamma=0.0))
    bias = torch.randn(3, 1, 1, 10)
    for given in (None, bias):
        torch.testing.assert_close(explicit(x, (3, 3), given), fused(x, (3, 3), given))


@torch.no_grad()
def test_sizes_of_merged_tokens_are_a_bias():
    """A token that counts twice is a token that is there twice."""
    attention, x = attention_and_tokens()
    twice = torch.cat((x, x[:, -1:]), 1)
    sizes = torch.ones(3, 1, 1, 10)
    sizes[..., -1] = 2
    torch.testing.assert_close(attention(x, (3, 3), sizes.log()), attention(twice, (3, 3))[:, :10])


@torch.no_grad()
@pytest.mark.parametrize('gate', ['linear', 'mlp', 'all_heads'])
def test_gates(gate):
    attention, x = attention_and_tokens(gate=gate)
    gates = attention.gate(x)
    assert gates.shape == (3, 10, 2, 1) and gates.min() > 0 and gates.max() < 1
    attention.gate.bias.fill_(100.0)
    plain, _ = attention_and_tokens()
    plain.load_state_dict({key: value for key, value in attention.state_dict().items() if 'gate' not in key})
    torch.testing.assert_close(attention(x, (3, 3)), plain(x, (3, 3)))
    attention.gate.bias.fill_(-100.0)
    torch.testing.assert_close(attention(x, (3, 3)), attention.proj.bias.expand(3, 10, -1))


@torch.no_grad()
def test_dropped_keys():
    attention, x = attention_and_tokens(key_drop=0.5)
    plain, _ = attention_and_tokens()
    assert torch.equal(attention(x, (3, 3)), plain(x, (3, 3)))  # evaluation drops nothing
    attention.train()
    torch.manual_seed(1)
    first, second = attention(x, (3, 3)), attention(x, (3, 3))
    assert not torch.equal(first, second)
    _, key, value = attention.split(x)
    sizes = torch.arange(10.0).expand(3, 1, 1, 10)
    key_kept, value_kept, kept = attention._drop_keys(key, value, sizes)
    assert key_kept.shape == (3, 2, 1 + 4, 4) and value_kept.shape == key_kept.shape
    assert (kept[..., 0] == 0).all() and not torch.equal(kept[0], kept[1])
    chosen = kept[0, 0, 0].long()
    assert torch.equal(key_kept[0], key[0][:, chosen]) and len(set(chosen.tolist())) == 5


@pytest.mark.parametrize(
    ('options', 'error', 'text'),
    [
        (dict(num_heads=3), ValueError, 'num_heads must divide dim, got num_heads=3, dim=8'),
        (dict(key_drop=1.0), ValueError, 'key_drop must be from 0 to below 1'),
        (dict(window_size=0), ValueError, 'window_size must be positive'),
        (dict(window_size=2, key_drop=0.5), ValueError, 'windows take neither clip nor key_drop'),
        (dict(gate='linaer'), ValueError, "gate must be one of .*, got 'linaer'; did you mean linear"),
        (dict(clipp={}), TypeError, "token mixer 'attention' has no option 'clipp'; did you mean clip"),
        (dict(name='atention'), ValueError, 'token_mixer must be one of .*; did you mean attention'),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        build_token_mixer({'num_heads': 2, **options}, dim=8)


def test_options_from_a_model():
    model = small(token_mixer=dict(clip=dict(alpha=0.1), gate='linear', key_drop=0.5)).train()
    assert all(block.attn.softmax.alpha == 0.1 and block.attn.key_drop == 0.5 for block in model.blocks)
    model(image()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ---- paths


@torch.no_grad()
def test_all_paths_with_equal_weights_are_the_model():
    plain, weighed = small(), small(path_scale=1.0)
    weighed.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(weighed(image()), plain(image()), rtol=1e-4, atol=1e-5)
    weighed.path_ensemble.scale[3] = 0  # the attention of block 1
    pruned = small(pruned_paths=(3,))
    pruned.load_state_dict(plain.state_dict())
    torch.testing.assert_close(pruned(image()), weighed(image()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pruned(image()), plain(image()))
    raw = [m.forward_intermediates(image(), intermediates_only=True) for m in (plain, pruned)]
    assert all(torch.equal(a, b) for a, b in zip(*raw, strict=True))  # a pruned path still feeds the longer ones


def test_paths_train():
    model = small(path_scale=0.5, pruned_paths=(0, 2), features_only=True).train()
    model.set_grad_checkpointing()
    sum(m.square().sum() for m in model(image())).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match=r'pruned paths must be numbers from 0 to 5, got \(6,\)'):
        small(pruned_paths=(6,))


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, dict(gate='linear'), dict(clip=dict(gamma=-0.01))])
def test_the_last_block_computes_what_the_head_reads(options):
    model, seen = small(token_mixer=options, layer_scale=0.5, distilled=True), []
    model.blocks[-1].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    whole = model.forward_head(model.forward_features(image()))
    torch.testing.assert_close(model(image()), whole)
    assert seen == [2 + 24, 2]
    model.train()(image())
    model.eval().reset_classifier(3, global_pool='avg')
    torch.testing.assert_close(model(image()), model.forward_head(model.forward_features(image())))
    assert seen[2:] == [2 + 24] * 3


def test_inference_in_place_equals_training_graphs():
    """Without gradients sums and activations overwrite branches: never what was kept, nor the input."""
    model, x = small(), image()
    expected, maps = model.forward_intermediates(x)
    before = x.clone()
    with torch.no_grad():
        ours, again = model.forward_intermediates(x)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(again, maps, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(x, before)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert model.run_blocks(*model.embed(x))[0].dtype == torch.float32  # the residual stream stays float32


# ---- timm's interface


@torch.no_grad()
def test_intermediates_as_timm_defines_them():
    model = small()
    pairs = model.forward_intermediates(image(), 2, return_prefix_tokens=True, norm=True, intermediates_only=True)
    assert [(m.shape, p.shape) for m, p in pairs] == [((1, 32, 4, 6), (1, 1, 32))] * 2
    tokens = model.forward_features(image())
    torch.testing.assert_close(pairs[-1][0].flatten(2).transpose(1, 2), tokens[:, 1:])
    rows = model.forward_intermediates(image(), 1, output_fmt='NLC', norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(rows, tokens[:, 1:])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC' or 'NLC', got output_fmt='NL'"):
        model.forward_intermediates(image(), output_fmt='NL')


@torch.no_grad()
def test_pooling_can_be_changed():
    model = small()
    features = model.forward_features(image())
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    model.reset_classifier(3, global_pool='avg')
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 1:].mean(1))
    with pytest.raises(ValueError, match="global_pool must be one of avg, token, got global_pool='max'"):
        model.reset_classifier(3, global_pool='max')


def test_sizes_of_the_model_are_checked():
    with pytest.raises(ValueError, match='depth must be a positive whole number, got depth=0'):
        small(depth=0)
