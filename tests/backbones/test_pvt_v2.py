"""Without this PVTv2 could drift from the paper's sizes, or its attention to a smaller map could read the wrong one."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model
from densezoo.backbones.pvt_v2 import PVTv2, SpatialReductionAttention, resolve_heads

# name -> parameters; to the unit where they were counted in the authors' code, else as published
SIZES = {
    'pvt_v2_b0': 3.666760,
    'pvt_v2_b1': 14.009000,
    'pvt_v2_b2': 25.362856,
    'pvt_v2_b2_li': 22.553512,
    'pvt_v2_b3': 45.2,
    'pvt_v2_b4': 62.6,
    'pvt_v2_b5': 82.0,
}


@pytest.mark.parametrize('name', SIZES)
def test_sizes_of_the_paper(name):
    with torch.device('meta'):
        model = create_model(name)
    tolerance = 0.05 if SIZES[name] == round(SIZES[name], 1) else 1e-6
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=tolerance)
    reductions = [block.token_mixer.sr_ratio for stage in model.stages for block in stage[:1]]
    assert reductions == [8, 4, 2, 1]


def test_the_dense_form_has_the_classifiers_norms():
    with torch.device('meta'):
        classifier, dense = create_model('pvt_v2_b0'), create_model('pvt_v2_b0', features_only=True)
    assert classifier.state_dict().keys() - dense.state_dict().keys() == {'head.weight', 'head.bias'}


# ---- attention to a smaller map


def mixer(**options):
    torch.manual_seed(0)
    return SpatialReductionAttention(dim=8, num_heads=2, **options).double().requires_grad_(False)


def image(*size):
    return torch.randn(2, *size, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def attended(mixer, x, smaller):
    """Each head by hand: queries of x, keys and values of the smaller map."""
    B, H, W, C = x.shape
    query, (key, value) = mixer.q(x).flatten(1, 2), mixer.kv(smaller).flatten(1, 2).chunk(2, -1)
    out = torch.empty_like(query)
    for head in (slice(0, 4), slice(4, 8)):
        weights = (query[..., head] @ key[..., head].transpose(1, 2) / 2).softmax(-1)
        out[..., head] = weights @ value[..., head]
    return mixer.proj(out).view(B, H, W, C)


def test_keys_are_blocks_made_one():
    attention, x = mixer(sr_ratio=2), image(4, 6)
    blocks = x.view(2, 2, 2, 3, 2, 8).permute(0, 1, 3, 5, 2, 4).flatten(3)  # (c, row, column), as in the filter
    smaller = attention.norm(F.linear(blocks, attention.sr.weight.flatten(1), attention.sr.bias))
    torch.testing.assert_close(attention(x), attended(attention, x, smaller))
    cut = mixer(sr_ratio=3).reduce(image(4, 5))
    torch.testing.assert_close(cut, mixer(sr_ratio=3).reduce(image(4, 5)[:, :3, :3]))  # beyond whole blocks: dropped


def test_linear_attention_pools_to_a_fixed_size():
    attention, x = mixer(pool_size=3), image(6, 9)
    pooled = x.view(2, 3, 2, 3, 3, 8).mean((2, 4))
    smaller = F.gelu(attention.norm(attention.sr(pooled)))
    torch.testing.assert_close(attention(x), attended(attention, x, smaller))
    assert attention.reduce(image(2, 20)).shape == (2, 3, 3, 8)


def test_without_reduction_it_is_plain_attention():
    attention, x = mixer(), image(3, 5)
    torch.testing.assert_close(attention(x), attended(attention, x, x))


@pytest.mark.parametrize('size', [(1, 1), (3, 9), (9, 2)])
def test_maps_smaller_than_the_reduction_are_padded_up_to_it(size):
    attention, x = mixer(sr_ratio=4), image(*size)
    height, width = size
    filled = F.pad(x, (0, 0, 0, max(4 - width, 0), 0, max(4 - height, 0)))
    assert attention(x).shape == x.shape
    torch.testing.assert_close(attention.reduce(x), attention.reduce(filled))


def test_heads():
    assert [resolve_heads(dim, None) for dim in (8, 32, 64, 96, 100)] == [1, 1, 2, 3, 2]
    assert resolve_heads(64, 4) == 4


# ---- other mixers, and arguments that cannot be built


@torch.no_grad()
def test_reduction_in_another_family():
    model = create_model(
        'poolformer_s12',
        depths=(1, 1, 1, 1),
        dims=(32, 32, 64, 64),
        mixers=(
            {'name': 'sra', 'sr_ratio': 8},
            {'name': 'sra', 'sr_ratio': 4, 'num_heads': 4},
            {'name': 'sra', 'pool_size': 7},
            'sra',
        ),
        features_only=True,
    ).eval()
    assert [tuple(m.shape[-2:]) for m in model(torch.randn(1, 3, 72, 104))] == [(18, 26), (9, 13), (5, 7), (3, 4)]
    assert [stage[0].token_mixer.num_heads for stage in model.stages] == [1, 4, 2, 2]


def test_other_mixers_in_pvt_v2():
    model = create_model('pvt_v2_b0', **PVTv2.reduced, mixers=('pool', 'sra', {'name': 'sra', 'sr_ratio': 3}, 'lsa'))
    kinds = [type(stage[0].token_mixer).__name__ for stage in model.stages]
    assert kinds == ['PoolMixer', *['SpatialReductionAttention'] * 2, 'LocallyGroupedAttention']
    assert [stage[0].token_mixer.sr_ratio for stage in model.stages[1:3]] == [4, 3]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_heads': (1, 3, 5, 8)}, 'num_heads must divide the width of its stage, got num_heads=3, dim=64'),
        ({'num_heads': 0}, 'num_heads must divide the width of its stage, got num_heads=0, dim=32'),
        ({'num_heads': (1, 2, 5)}, 'num_heads must be one value or 4, one per stage'),
        ({'sr_ratios': 0}, 'sr_ratio and pool_size must be positive, got sr_ratio=0'),
        ({'mixers': {'name': 'sra', 'pool_size': 0}}, 'sr_ratio and pool_size must be positive, got .*pool_size=0'),
        ({'mixers': 'sar'}, r"mixer must be one of .*, got 'sar'"),
    ],
)
def test_errors(arguments, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        create_model('pvt_v2_b0', **arguments)
