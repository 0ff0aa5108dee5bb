"""Without this STViT-R's semantic blocks could drift from the authors' operations, mix up the two kinds of blocks of a
checkpoint's third stage, or read beyond the map at sizes that windows do not divide."""

from functools import partial

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import norm_factory
from densezoo.backbones.layers.grid import from_windows, to_windows
from densezoo.backbones.layers.semantic import (
    OffsetBias,
    bins,
    patches_around,
    pool_windows,
)
from densezoo.backbones.stvit_swin import ConvStem, Recovery, STViTSwin, TokenExchange, TokenGeneration, TokenMixing
from densezoo.deploy import fuse_for_deploy

NAME = 'stvit_r_swin_tiny'
VARIANT = dict(learned_tokens=True, token_bias=True, shortcut=True)
PARTS = dict(dim=96, num_heads=4, mlp_ratio=4.0, qkv_bias=True, norm=norm_factory('layer_eps5'), drop_path=0.0)


def small(**overrides):
    torch.manual_seed(0)
    return create_model(NAME, **{**STViTSwin.reduced, 'num_classes': 7, **overrides}).eval()


def on_a_map(tokens):
    side = round(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


# ---- the authors' operations

RECORDED = probe.load('stvit_op')


def block(make, prefix, **options):
    """One block with the recorded weights, which lie in a third stage's place for the renaming of a checkpoint."""
    module = make(**PARTS, **options).eval()
    state = {
        key.replace(f'{prefix}.', 'layers.2.blocks.1.', 1): value
        for key, value in probe.golden_state(RECORDED).items()
        if key.startswith(f'{prefix}.')
    }
    ours = {key.removeprefix('stages.2.1.'): value for key, value in STViTSwin.convert(state).items()}
    module.load_state_dict(ours)
    return module


GENERATE = partial(TokenGeneration, window_size=7, sample=3, key_window=10, conv_position=False)


@pytest.mark.parametrize(
    ('case_name', 'prefix', 'make', 'given'),
    [
        ('semantic_attention', 'sem', partial(GENERATE, shortcut=False), 'x'),
        ('semantic_attention_shortcut', 'sem_short', partial(GENERATE, shortcut=True), 'x'),
        ('semantic_attention_given_tokens', 'sem', partial(GENERATE, shortcut=False), 'xy'),
        ('block_cross', 'blk', TokenExchange, 'yx'),
        ('block_self', 'blk', partial(TokenMixing, window=None), 'y'),
        ('block_local3', 'local', partial(TokenMixing, window=3), 'y'),
        ('block_relpos6', 'relpos', partial(TokenMixing, window=None, bias_side=6), 'y'),
        ('block_recover', 'blk', Recovery, 'xy'),
    ],
)
@torch.no_grad()
def test_recorded_operations(case_name, prefix, make, given):
    case = golden.case(RECORDED, case_name)
    inputs = {'x': on_a_map(probe.image(0, (2, 196, 96))), 'y': on_a_map(probe.image(1, (2, 36, 96)))}
    out = block(make, prefix)(*(inputs[name] for name in given))
    probe.compare(out.flatten(1, 2), case['outputs']['y'])


def test_recorded_pooling():
    case = golden.case(RECORDED, 'pool_adaptive_max_7to3')
    x = probe.image(0, (4, 96, 7, 7)).permute(0, 2, 3, 1)
    probe.compare(pool_windows(x, 7, 3).flatten(1, 2), case['outputs']['y'])


# ---- windows, patches, offsets


@pytest.mark.parametrize(('size', 'count'), [(7, 3), (14, 4), (5, 5), (6, 4), (9, 1)])
def test_bins_are_those_of_adaptive_pooling(size, count):
    x = torch.randn(2, 3, size, size)
    expected = torch.nn.functional.adaptive_max_pool2d(x, count)
    ours = pool_windows(x.permute(0, 2, 3, 1), size, count).permute(0, 3, 1, 2)
    assert torch.equal(ours, expected)
    assert len(bins(size, count)) == count


@pytest.mark.parametrize(
    ('size', 'starts'),
    [(14, (0, 4)), (21, (0, 6, 11)), (8, (0, 0)), (15, (0, 5, 5)), (10, (0, 0)), (35, (0, 6, 13, 20, 25))],
)
def test_patches_are_those_around_their_windows(size, starts):
    """Of 10 positions around windows of 7, within the map; at 14, the size of the authors, theirs."""
    x = torch.arange(size).float().view(1, 1, size, 1)
    length = min(size, 10)
    expected = torch.stack([torch.arange(first, first + length).float() for first in starts])
    assert torch.equal(patches_around(x, 7, 10)[0, :, :, 0], expected)
    assert torch.equal(patches_around(x.transpose(1, 2), 7, 10)[0, :, :, 0], expected)


def test_windows_that_leave_the_map_repeat_its_border():
    x = torch.randn(1, 5, 8, 2)
    pooled = pool_windows(x, 4, 2)
    assert pooled.shape == (1, 4, 4, 2)
    assert torch.equal(pooled[:, 0, 0], x[:, :2, :2].amax((1, 2)))
    assert torch.equal(pooled[:, 2], pooled[:, 3])  # rows 4, 4 and 4, 4
    assert torch.equal(pooled[:, 2, 0], x[:, 4, :2].amax(1))


def test_windows_round_trip():
    x = torch.randn(2, 6, 9, 4)
    windows = to_windows(x, 3)
    assert torch.equal(windows[:, 1], x[:, :3, 3:6].flatten(1, 2))
    assert torch.equal(from_windows(windows, 3, (6, 9)), x)


def test_offsets_beyond_the_table_take_its_last_entry():
    bias = OffsetBias(2, 1)
    with torch.no_grad():
        bias.table.copy_(torch.arange(9.0)[:, None])
    full = bias((2, 2))[0]
    assert full[0].tolist() == [4, 3, 1, 0]
    wide = bias((2, 4))[0].view(2, 4, 2, 4)
    assert torch.equal(wide[:, :2, :, :2].reshape(4, 4), full)
    assert wide[0, 0, 0].tolist() == [4, 3, 3, 3] and wide[0, 3, 1].tolist() == [2, 2, 2, 1]


# ---- whole models


@torch.no_grad()
@pytest.mark.parametrize(
    ('stem', 'overrides'),
    [(NAME, {}), pytest.param(f'{NAME}_global_relpos_shortcut', VARIANT, marks=pytest.mark.slow)],
)
def test_recorded_maps(stem, overrides):
    recorded = probe.load(stem)
    with torch.device('meta'):
        assert sum(p.numel() for p in create_model(NAME, **overrides).parameters()) == recorded['params']
    model = load_checkpoint(create_model(NAME, **overrides).eval(), probe.golden_state(recorded))
    case = golden.case(recorded, 'logits_224')
    kept = {}

    def keep(module, key):
        module.register_forward_hook(lambda _, inputs, out: kept.update({key: out.flatten(1, 2)}))

    keep(model.stages[2][1], 'semantic_tokens_0')
    keep(model.stages[3][-1], 'stage4_after_merge')
    for s in (1, 2, 3):
        keep(model.downsample_layers[s], f'stage{s}_after_merge')
    kept['logits'] = model(probe.image(case['seed'], case['shape']))
    assert kept.keys() == case['outputs'].keys()
    for key, stored in case['outputs'].items():
        probe.compare(kept[key], stored)


def authors_layout(self, x):
    """The stem with tokens as a transposed view: PyTorch's batch norm in evaluation mode then returns, for one image, a
    wrong gradient on a CPU, which the recorded gradients went through."""
    x = self.conv2(self.conv1(x.contiguous()))
    return x.flatten(2).transpose(1, 2).unflatten(1, x.shape[-2:])


@pytest.mark.slow
def test_recorded_gradients(monkeypatch):
    monkeypatch.setattr(ConvStem, 'forward', authors_layout)
    recorded = probe.load(NAME)
    golden.run(golden.build(NAME), recorded, golden.case(recorded, 'grad_224'))


def test_gradients_do_not_depend_on_the_batch():
    model, x = small(), torch.randn(2, 3, 64, 96).requires_grad_()
    (together,) = torch.autograd.grad(model(x).square().sum(), x)
    alone = [torch.autograd.grad(model(x[i : i + 1]).square().sum(), x)[0][i] for i in range(2)]
    torch.testing.assert_close(torch.stack(alone), together)


@pytest.mark.parametrize('overrides', [VARIANT, dict(conv_position=True, layer_scale=0.5)])
def test_options_have_effect_gradients_and_take_other_sizes(overrides):
    model, x = small(img_size=64, **overrides), torch.randn(1, 3, 96, 160)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    plain = small()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for module in (model, plain):
            for key, parameter in module.named_parameters():
                if key.endswith('.scale'):
                    parameter.fill_(1.0)
        assert not torch.allclose(model(x), plain(x), atol=1e-4)


def test_the_third_stage_is_groups_of_six():
    model = small(depths=(1, 1, 12, 1))
    kinds = [type(block).__name__ for block in model.stages[2]]
    group = ['MetaFormerBlock', 'TokenGeneration', 'TokenExchange', 'TokenMixing', 'TokenMixing', 'Recovery']
    assert kinds == group * 2
    assert [block.window for block in model.stages[2] if isinstance(block, TokenMixing)] == [2, None] * 2


@torch.no_grad()
def test_scales_fold_for_deployment():
    model, x = small(), torch.randn(1, 3, 64, 64)
    for key, parameter in model.named_parameters():
        if key.endswith('.scale'):
            parameter.uniform_(0.5, 1.5)
    fused = fuse_for_deploy(model)
    assert not any('layer_scale' in key for key in fused.state_dict())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'depths': (1, 1, 4, 1)}, r'multiple of six, got depths=\(1, 1, 4, 1\)'),
        ({'sample': 4}, r'sample must be from 1 .* got sample=4, window_size='),
        ({'key_window': 2}, r'key_window not below that.*key_window=2'),
        ({'window_size': (4, 0, 3, 2)}, r'window_size must be positive, got window_size=\(4, 0, 3, 2\)'),
    ],
)
def test_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)
