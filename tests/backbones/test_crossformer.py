"""Without this CrossFormer could group the wrong positions on small maps, fold its position bias into another table, or
lose a cooling layer without any shape changing."""

import pytest
import torch

from densezoo.backbones import create_model
from densezoo.backbones.crossformer import CoolingBlock, CrossFormer, GroupAttention
from densezoo.backbones.layers.dynamic_position_bias import (
    DynamicPositionBias,
    PositionBiasTable,
    fold_position_bias,
)

# blocks of stage 3 with a cooling layer, and group sizes, by name
FACTS = {
    'crossformer_tiny': ([], (7, 7, 7, 7)),
    'crossformer_small': ([], (7, 7, 7, 7)),
    'crossformer_base': ([], (7, 7, 7, 7)),
    'crossformer_large': ([], (7, 7, 7, 7)),
    'crossformer_pp_small': ([2, 5, 8, 11, 14], (4, 4, 14, 7)),
    'crossformer_pp_base': ([2, 5, 8, 11, 14], (4, 4, 14, 7)),
    'crossformer_pp_large': ([2, 5, 8, 11, 14], (4, 4, 14, 7)),
    'crossformer_pp_huge': ([2, 5, 8, 11, 14], (4, 4, 14, 7)),
}


def small(**overrides):
    torch.manual_seed(0)
    model = CrossFormer(**{**CrossFormer.reduced, 'num_classes': 5, **overrides}).eval()
    with torch.no_grad():  # biases of a fresh model are nearly 0
        for module in model.modules():
            if isinstance(module, DynamicPositionBias):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn_like(parameter))
    return model


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', FACTS)
def test_paper_facts(name):
    cooling, groups = FACTS[name]
    with torch.device('meta'):
        model = create_model(name)
    assert [b for b, block in enumerate(model.stages[2]) if isinstance(block, CoolingBlock)] == cooling
    assert tuple(stage[0].token_mixer.group_size for stage in model.stages) == groups
    distances = [block.token_mixer.interval for block in model.stages[1]][:2]
    assert distances == [1, 2 if 'pp' in name else 4][: len(distances)]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(model.metadata['params'], abs=0.05)


def test_dense_form_of_pp_has_the_published_groups():
    with torch.device('meta'):
        model = create_model('crossformer_pp_small', features_only=True)
    assert [stage[1].token_mixer.group_size for stage in model.stages] == [7, 7, 7, 7]
    assert [stage[1].token_mixer.interval for stage in model.stages] == [8, 4, 2, 1]


@pytest.mark.parametrize(('height', 'width'), [(3, 3), (2, 4)])
@torch.no_grad()
def test_bias_belongs_to_the_offset_of_the_pair(height, width):
    """The bias of positions i and j is what the MLP says for row and column of i minus those of j."""
    torch.manual_seed(0)
    bias = DynamicPositionBias(64, 2, window=3)
    found = bias(height, width)
    places = [(r, c) for r in range(height) for c in range(width)]
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            offset = torch.tensor([[row - other_row, column - other_column]], dtype=torch.float)
            expected = bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offset))))[0]
            torch.testing.assert_close(found[:, i, j], expected)


@pytest.mark.parametrize('dense', [False, True])
@torch.no_grad()
def test_folded_position_bias(dense):
    model = small(features_only=dense, span_small_maps=dense)
    folded = fold_position_bias(model)
    assert any(isinstance(m, PositionBiasTable) for m in folded.modules())
    assert not any(isinstance(m, DynamicPositionBias) for m in folded.modules())
    assert any(isinstance(m, DynamicPositionBias) for m in model.modules())  # the argument stays
    for size in ((64, 96), (33, 130)):
        x = images(*size)
        ours, expected = folded(x), model(x)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@torch.no_grad()
def test_table_too_small_for_a_map():
    model = small(features_only=True, span_small_maps=True)
    x = images(32, 320, 1)
    with pytest.raises(
        ValueError, match=r'reaches 8 positions, got a window of 2 x 20; fold the model with .*reach=20'
    ):
        fold_position_bias(model)(x)
    for a, b in zip(fold_position_bias(model, reach=20)(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_groups_of_small_maps():
    narrow, spanning = (GroupAttention(dim=32, group_size=7, interval=4, span_small_maps=s) for s in (False, True))
    for mixer in (narrow, spanning):
        assert mixer.group(8, 9) == (7, 7, 4)
    assert narrow.group(6, 9) == (6, 6, 1) and spanning.group(6, 9) == (6, 9, 1)
    assert narrow.group(9, 7) == (7, 7, 1) and spanning.group(9, 7) == (9, 7, 1)


@torch.no_grad()
def test_long_distance_attention_sees_every_other_position():
    mixer = GroupAttention(dim=32, group_size=2, interval=2).eval()
    x = torch.randn(1, 4, 4, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 1, 0] += 1
    moved = (mixer(changed) - mixer(x)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().tolist() == [[1, 0], [1, 2], [3, 0], [3, 2]]


@torch.no_grad()
def test_mixer_in_another_family():
    mixers = ('pool', dict(name='group', group_size=3, interval=2), 'group', 'attention')
    model = create_model('poolformer_s12', mixers=mixers, depths=(1, 1, 1, 1), dims=(16, 32, 32, 32), num_classes=3)
    assert model.eval()(images(72, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'num_heads': (2, 3, 3, 4)}, r'num_heads must divide the width of its stage, got num_heads=3, dim=64'),
        ({'group_size': 0}, r'group_size and interval must be positive, got group_size=0'),
        ({'dims': (20, 64, 96, 128), 'num_heads': 1}, r'dims must be multiples of 8, half for each kernel, got dim=20'),
        ({'dims': (8, 64, 96, 128), 'num_heads': 1}, r'dims must be at least 16 .* got dim=8'),
        ({'interval': (1, 2)}, r'interval must be one value or 4, one per stage'),
    ],
)
def test_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)
