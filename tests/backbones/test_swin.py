"""Without this Swin could lose what surrounds the shared contract: timm's weights, the shift at small maps, its parts.

timm's Swin is a second source. It rolls before it pads, and decides at construction whether a block shifts, so its
recorded maps bind us only where windows divide every map, and in the last stage only at the size it was built for.
"""

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.swin import PatchMerging, Swin, WindowAttention

NAME = 'swin_tiny_patch4_window7_224'


def raw_maps(stem, case_name, **overrides):
    """Maps before output norms, and what was recorded."""
    recorded = probe.load(stem)
    case = golden.case(recorded, case_name)
    model = create_model(NAME, features_only=True, **overrides).eval()
    load_checkpoint(model, probe.golden_state(recorded))
    with torch.no_grad():
        maps = model.forward_intermediates(probe.image(case['seed'], case['shape']), intermediates_only=True)
    return dict(zip(('c2', 'c3', 'c4', 'c5'), maps, strict=True)), case['outputs']


@pytest.mark.parametrize(
    ('ending', 'case_name', 'always_shift', 'levels'),
    [
        ('timm', 'features_224', False, 'c2 c3 c4 c5'),
        ('timm_official_keys', 'features_224', False, 'c2 c3 c4 c5'),
        ('timm_official_keys', 'features_224_always_partition', True, 'c2 c3 c4 c5'),
        # timm's last stage does not shift, because it would not at 224; the authors' does at 448
        pytest.param('timm_official_keys', 'features_448x448', False, 'c2 c3 c4', marks=pytest.mark.slow),
        pytest.param(
            'timm_official_keys', 'features_448x448_always_partition', True, 'c2 c3 c4 c5', marks=pytest.mark.slow
        ),
    ],
)
def test_maps_agree_with_timm_where_windows_divide_them(ending, case_name, always_shift, levels):
    maps, recorded = raw_maps(f'{NAME}__{ending}', case_name, always_shift=always_shift)
    for level in levels.split():
        probe.compare(maps[level], recorded[level])


@pytest.mark.slow
@pytest.mark.parametrize(
    ('ending', 'case_name'),
    [
        ('timm', 'features_200x264'),
        ('timm_official_keys', 'features_200x264'),
        ('timm_official_keys', 'features_200x264_always_partition'),
    ],
)
def test_maps_differ_from_timm_where_it_rolls_before_padding(ending, case_name):
    maps, recorded = raw_maps(f'{NAME}__{ending}', case_name)
    for level, ours in maps.items():
        assert list(ours.shape) == recorded[level]['shape']
        with pytest.raises(AssertionError, match='differs by'):
            probe.compare(ours, recorded[level])


@pytest.mark.parametrize(
    ('name', 'params', 'macs'),
    [
        ('swin_tiny_patch4_window7_224', 28.288, 4.5),
        ('swin_small_patch4_window7_224', 49.606, 8.7),
        ('swin_base_patch4_window7_224', 87.768, 15.4),
        ('swin_base_patch4_window12_384', 87.904, 47.1),
        ('swin_large_patch4_window7_224', 196.532, 34.5),
        ('swin_large_patch4_window12_384', 196.736, 103.9),
    ],
)
def test_sizes_of_the_paper(name, params, macs):
    with torch.device('meta'):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=6e-4)
    assert model.metadata['macs'] == macs
    heads = [stage[0].token_mixer.num_heads for stage in model.stages]
    assert [block.token_mixer.shift for block in model.stages[2]][:4] == [
        0,
        *[model.stages[0][1].token_mixer.shift, 0] * 2,
    ][:4]
    assert [dim // h for dim, h in zip(model.feature_info.channels(), heads, strict=True)] == [32] * 4


def test_the_classifier_does_not_shift_maps_of_one_window():
    torch.manual_seed(0)
    shifting, plain, classifier = (
        WindowAttention(dim=8, num_heads=2, window_size=4, shift=shift, always_shift=always)
        for shift, always in ((2, True), (0, True), (2, False))
    )
    for other in (plain, classifier):
        other.load_state_dict(shifting.state_dict())
    for size, expected in (((4, 4), plain), ((3, 9), plain), ((5, 5), shifting), ((9, 4), plain), ((8, 12), shifting)):
        x = torch.randn(1, *size, 8)
        assert torch.equal(classifier(x), expected(x))
    assert not torch.allclose(plain(torch.ones(1, 4, 4, 8).cumsum(1)), shifting(torch.ones(1, 4, 4, 8).cumsum(1)))


def test_padding_carries_the_bias_of_qkv():
    torch.manual_seed(0)
    attention = WindowAttention(dim=8, num_heads=2, window_size=4, shift=1)
    with torch.no_grad():
        attention.qkv.bias.normal_()
    x = torch.randn(1, 6, 7, 8)
    padded = torch.zeros(1, 8, 8, 8)
    padded[:, :6, :7] = x
    torch.testing.assert_close(attention(x), attention(padded)[:, :6, :7])
    without = WindowAttention(dim=8, num_heads=2, window_size=4, qkv_bias=False)
    torch.testing.assert_close(without(x), without(padded)[:, :6, :7])


def test_merging_takes_the_rows_of_a_column_first():
    merging = PatchMerging(1, 4, norm=lambda dim: torch.nn.Identity())
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(4))
    x = torch.arange(12.0).reshape(1, 3, 4, 1)
    assert merging(x)[0].tolist() == [[[0, 4, 1, 5], [2, 6, 3, 7]], [[8, 0, 9, 0], [10, 0, 11, 0]]]


def test_other_mixers_and_windows_in_swin():
    model = create_model(
        NAME, **{**Swin.reduced, 'mixers': ('pool', {'name': 'window', 'window_size': 5}, 'window', 'attention')}
    )
    assert [type(stage[-1].token_mixer).__name__ for stage in model.stages] == [
        'PoolMixer',
        'WindowAttention',
        'WindowAttention',
        'Attention',
    ]
    assert [block.token_mixer.window_size for stage in model.stages[1:3] for block in stage] == [5, 5, 2, 2]
    assert [block.token_mixer.shift for stage in model.stages[1:3] for block in stage] == [0, 2, 0, 1]


@torch.no_grad()
def test_window_attention_in_another_family():
    model = create_model(
        'poolformer_s12',
        depths=(1, 1, 1, 1),
        dims=(32, 32, 64, 64),
        mixers=('pool', 'window', {'name': 'window', 'num_heads': 4, 'shift': 3}, 'window'),
        features_only=True,
    ).eval()
    assert [tuple(m.shape[-2:]) for m in model(torch.randn(1, 3, 72, 104))] == [(18, 26), (9, 13), (5, 7), (3, 4)]
    assert [stage[0].token_mixer.num_heads for stage in model.stages[1:]] == [1, 4, 2]


def test_no_weight_decay_of_the_tables():
    model = create_model(NAME, **Swin.reduced)
    tables = {
        f'stages.{s}.{b}.token_mixer.position_bias.table'
        for s, depth in enumerate(Swin.reduced['depths'])
        for b in range(depth)
    }
    assert model.no_weight_decay() == tables


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_heads': (5, 6, 12, 24)}, r'num_heads must divide dim, got num_heads=5, dim=96'),
        ({'num_heads': (3, 6, 12)}, r'num_heads must be one value or 4, one per stage'),
        ({'window_size': 0}, r'window_size must be positive, got window_size=0'),
        ({'window_size': (7, 7)}, r'window_size must be one value or 4'),
        ({'mixers': {'name': 'window', 'shift': 7}}, r'shift must be from 0 to window_size - 1, got shift=7'),
        ({'mixers': 'windw'}, r"mixer must be one of .*, got 'windw'; did you mean window"),
    ],
)
def test_errors(arguments, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        create_model(NAME, **arguments)
