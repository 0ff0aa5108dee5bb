"""Without this Twins could attend to padding where it must not, lose its invariance to shifts, or drift from the paper.

At sizes that strides do not divide the authors drop border pixels where ours pads: those recorded maps are compared
with the padding switched off.
"""

import itertools

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model
from densezoo.backbones.layers.polyphase import AnchoredDownsample, anchor
from densezoo.backbones.twins import LocallyGroupedAttention, PositionEncoding
from densezoo.deploy import export_program

# name -> parameters; those of the small ones were counted in the authors' code, the others stated in the paper
SIZES = {
    'twins_pcpvt_small': 24.106216,
    'twins_pcpvt_base': 43.8,
    'twins_pcpvt_large': 60.9,
    'twins_svt_small': 24.060776,
    'twins_svt_base': 56.0,
    'twins_svt_large': 99.2,
}
TINY = {'depths': (1, 1, 1, 1), 'dims': (8, 8, 16, 16), 'num_heads': 2, 'mlp_ratios': 1}


@pytest.mark.parametrize('name', SIZES)
def test_sizes_of_the_paper(name):
    with torch.device('meta'):
        model = create_model(name)
    tolerance = 0.1 if SIZES[name] == round(SIZES[name], 1) else 1e-6
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=tolerance)
    widths = [dim // stage[0].token_mixer.num_heads for dim, stage in zip(model.feature_info.channels(), model.stages)]
    assert widths == [64 if 'pcpvt' in name else 32] * 4


def test_blocks_take_turns_and_encode_positions_once():
    with torch.device('meta'):
        svt, pcpvt = create_model('twins_svt_small'), create_model('twins_pcpvt_small')
    kinds = [''.join(type(block.token_mixer).__name__[0] for block in stage) for stage in svt.stages]
    assert kinds == ['LS', 'LS', 'LS' * 5, 'LS' * 2]  # locally grouped, spatial reduction
    assert {type(block.token_mixer).__name__[0] for stage in pcpvt.stages for block in stage} == {'S'}
    for model in (svt, pcpvt):
        assert [[b.pos_block is not None for b in stage] for stage in model.stages] == [
            [True] + [False] * (len(stage) - 1) for stage in model.stages
        ]
        assert model.no_weight_decay() == {f'stages.{s}.0.pos_block.proj.{kind}' for s in range(4) for kind in FILTER}


FILTER = ('weight', 'bias')


@pytest.mark.parametrize(
    ('stem', 'case_name'),
    [
        ('twins_svt_small__dense', 'features_200x264'),  # all stages are filled up below and to the right
        pytest.param('twins_svt_small__dense', 'features_224x264', marks=pytest.mark.slow),  # the first on one side
        pytest.param('twins_svt_small__dense_det', 'features_200x264', marks=pytest.mark.slow),
        pytest.param('twins_pcpvt_small__dense', 'features_200x264', marks=pytest.mark.slow),
    ],
)
def test_recorded_maps_where_borders_are_dropped(stem, case_name, monkeypatch):
    recorded = probe.load(stem)
    model = golden.build(stem)
    for downsampling in model.downsample_layers:
        monkeypatch.setattr(downsampling, 'drops_border', False)
    golden.run(model, recorded, golden.case(recorded, case_name))


# ---- windows and their padding


def attention(padding, window_size=4):
    torch.manual_seed(0)
    mixer = LocallyGroupedAttention(dim=8, num_heads=2, window_size=window_size, padding=padding)
    torch.nn.init.normal_(mixer.qkv.bias)
    return mixer.requires_grad_(False)


@pytest.mark.parametrize(
    ('size', 'same_as_default'),
    [((6, 7), {'mask'}), ((8, 7), {'attend'}), ((6, 8), {'attend'}), ((8, 4), {'mask', 'attend'})],
)
def test_the_published_segmentation_masks_what_fills_up_both_sides(size, same_as_default):
    x = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1))
    default = attention('mask_if_both')(x)
    same = {padding for padding in ('mask', 'attend') if torch.allclose(attention(padding)(x), default, atol=1e-6)}
    assert same == same_as_default


@pytest.mark.parametrize(('form', 'padding'), [({}, 'mask'), ({'features_only': True}, 'mask_if_both')])
def test_padding_of_each_form(form, padding):
    with torch.device('meta'):
        model = create_model('twins_svt_small', **form)
        corrected = create_model('twins_svt_small', **form, padding='mask')
        detection = create_model('twins_svt_small', features_only=True, dense='det')
    assert [m.stages[2][4].token_mixer.padding for m in (model, corrected, detection)] == [padding, 'mask', 'attend']


def test_windows_attend_among_their_own_positions():
    mixer = attention('mask')
    x = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(1))
    out = mixer(x)
    for rows, columns in itertools.product((slice(0, 4), slice(4, 8)), repeat=2):
        window = x[:, rows, columns]
        query, key, value = mixer.qkv(window).flatten(1, 2).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(window.shape)
        torch.testing.assert_close(out[:, rows, columns], mixer.proj(expected))


def test_padding_that_is_attended_to_carries_the_bias():
    mixer = attention('attend')
    x = torch.randn(2, 6, 7, 8, generator=torch.Generator().manual_seed(1))
    filled = F.pad(x, (0, 0, 0, 1, 0, 2))
    torch.testing.assert_close(mixer(x), mixer(filled)[:, :6, :7])


# ---- shifts on a torus


@pytest.mark.parametrize(('size', 'period'), [((12, 8), 4), ((9, 12), 4), ((7, 5), 3), ((6, 6), 1)])
def test_anchoring_moves_maps_by_whole_blocks(size, period):
    x = torch.randn(2, *size, 3, generator=torch.Generator().manual_seed(0))
    anchored = anchor(x, period)
    divides = [length % period == 0 for length in size]
    for shift in itertools.product(range(size[0]), range(size[1])):
        moved = anchor(x.roll(shift, (1, 2)), period)
        steps = [range(0, length, period) if divided else [0] for length, divided in zip(size, divides)]
        for image, reference in zip(moved, anchored):
            assert any(torch.equal(image, reference.roll(back, (0, 1))) for back in itertools.product(*steps))


@torch.no_grad()
def test_anchored_layers_export_with_any_batch_and_size():
    layer = AnchoredDownsample(3, 8, kernel=4, stride=4, padding=0, image=True).eval()
    program = export_program(layer, torch.randn(2, 3, 24, 36), dynamic_size=True, min_size=9).module()
    for size in ((1, 3, 24, 36), (3, 3, 9, 14), (2, 3, 31, 12)):
        x = torch.randn(size)
        torch.testing.assert_close(program(x), layer(x))


def test_circular_position_encoding_moves_with_the_map():
    torch.manual_seed(0)
    encoding, x = PositionEncoding(4, circular=True), torch.randn(1, 5, 6, 4)
    torch.testing.assert_close(encoding(x.roll((2, 5), (1, 2))), encoding(x).roll((2, 5), (1, 2)))
    inside = (slice(None), slice(1, -1), slice(1, -1))
    plain = PositionEncoding(4)
    plain.load_state_dict(encoding.state_dict())
    torch.testing.assert_close(plain(x)[inside], encoding(x)[inside])


def logits_of_shifts(polyphase, size, shifts, batch=112):
    torch.manual_seed(0)
    model = create_model('twins_svt_small', **{**TINY, 'depths': (2, 2, 1, 1)}, num_classes=10, polyphase=polyphase)
    x = torch.randn(3, *size)
    shifted = torch.stack([x.roll(shift, (1, 2)) for shift in shifts])
    with torch.no_grad():
        return torch.cat([model.eval()(images) for images in shifted.split(batch)])


@pytest.mark.parametrize(('size', 'step'), [((56, 56), 1), ((45, 62), 7)], ids=['all shifts', 'no stride divides'])
def test_polyphase_predictions_do_not_change_under_shifts(size, step):
    shifts = list(itertools.product(range(0, size[0], step), range(0, size[1], step)))
    logits = logits_of_shifts(True, size, shifts)
    assert len(logits) == len(shifts) >= 50 and logits.argmax(1).unique().numel() == 1
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-5 * logits.abs().max().item())


def test_without_polyphase_shifts_change_predictions():
    logits = logits_of_shifts(False, (56, 56), [(0, 0), (1, 3), (2, 2)])
    assert (logits - logits[:1]).abs().max() > 1e-2 * logits.abs().max()


# ---- other mixers, and arguments that cannot be built


@torch.no_grad()
def test_windows_in_another_family():
    model = create_model(
        'poolformer_s12',
        depths=(1, 1, 1, 1),
        dims=(32, 32, 64, 64),
        mixers=('pool', 'lsa', {'name': 'lsa', 'window_size': 2, 'num_heads': 4}, {'name': 'lsa', 'padding': 'attend'}),
        features_only=True,
    ).eval()
    assert [tuple(m.shape[-2:]) for m in model(torch.randn(1, 3, 72, 104))] == [(18, 26), (9, 13), (5, 7), (3, 4)]
    assert [stage[0].token_mixer.num_heads for stage in model.stages[1:]] == [1, 4, 2]


def test_other_mixers_in_twins():
    model = create_model('twins_svt_small', **TINY, mixers=('pool', None, {'name': 'lsa', 'window_size': 3}, None))
    kinds = [type(stage[0].token_mixer).__name__ for stage in model.stages]
    assert kinds == ['PoolMixer'] + ['LocallyGroupedAttention'] * 3
    assert [stage[0].token_mixer.window_size for stage in model.stages[1:]] == [7, 3, 7]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_heads': (2, 4, 7, 16)}, 'num_heads must divide the width of its stage, got num_heads=7, dim=256'),
        ({'num_heads': (2, 4, 8)}, 'num_heads must be one value or 4, one per stage'),
        ({'window_size': 0}, 'window_size must be positive, got window_size=0'),
        ({'sr_ratios': (8, 0, 2, 1)}, 'sr_ratio and pool_size must be positive, got sr_ratio=0'),
        ({'padding': 'maks'}, "padding must be one of .*, got 'maks'; did you mean mask"),
        ({'dense': 'segm'}, "dense must be one of .*, got 'segm'; did you mean seg"),
        ({'polyphase': True, 'features_only': True}, 'polyphase .* is for classifiers; got features_only=True'),
        ({'polyphase': True, 'mixers': 'pool'}, "polyphase needs the family's own mixers, got mixers="),
    ],
)
def test_errors(arguments, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        create_model('twins_svt_small', **arguments)
