"""Without this SReT's recursion, its slices or its permutations could drift from the published system."""

import copy
import re

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.sret import ConvStem, SlicedAttention, SReT

# name -> parameters in millions; to the unit where they were counted in the authors' code, else as published
SIZES = {'sret_t': 4.755979, 'sret_t_wo_slice': 4.755979, 'sret_lt': 4.988024, 'sret_s': 20.9, 'sret_s_wo_slice': 20.9}


@pytest.mark.parametrize('name', SIZES)
def test_sizes_of_the_paper(name):
    with torch.device('meta'):
        model = create_model(name)
    tolerance = 0.06 if SIZES[name] == 20.9 else 1e-6
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=tolerance)


def small(**arguments):
    torch.manual_seed(0)
    return create_model('sret_t', **{**SReT.reduced, 'num_classes': 7, **arguments}).eval()


# ---- goldens

SLOW = pytest.mark.slow
CASES = [
    ('SReT_T', 'logits_224'),
    ('SReT_T', 'logits_224_coef_plus1_identity_perm'),
    ('SReT_T', 'grad_224_coef_plus1_identity_perm'),
    ('SReT_T_wo_slice', 'grad_224_coef_plus1'),
    ('SReT_LT', 'logits_224_coef_plus1'),
    pytest.param('SReT_T', 'logits_224_identity_perm', marks=SLOW),
    pytest.param('SReT_T', 'logits_224_coef_plus1', marks=SLOW),
    pytest.param('SReT_T', 'grad_224_identity_perm', marks=SLOW),
    pytest.param('SReT_T_wo_slice', 'logits_224_coef_plus1', marks=SLOW),
    pytest.param('SReT_T_wo_slice', 'grad_224', marks=SLOW),
    pytest.param('SReT_LT', 'logits_224', marks=SLOW),
    pytest.param('SReT_LT', 'logits_224_identity_perm', marks=SLOW),
    pytest.param('SReT_LT', 'logits_224_coef_plus1_identity_perm', marks=SLOW),
]


@pytest.mark.parametrize(('stem', 'case_name'), CASES)
def test_recorded_outputs(stem, case_name):
    recorded = probe.load(stem)
    case = copy.deepcopy(golden.case(recorded, case_name))
    state = probe.golden_state(recorded)
    if 'plus1' in case_name:  # coefficients near 1 instead of near 0
        state = {key: value + 1 if '.coefficient' in key else value for key, value in state.items()}
    drawn = not stem.endswith('wo_slice') and 'identity' not in case_name
    model = load_checkpoint(golden.create(stem, permute='always' if drawn else 'train').eval(), state)
    # a shared block's gradient was recorded under the name of its first run, its values under that of its second
    first = 'grad_transformers.0.blocks.0.attn.qkv.weight'
    if first in case['outputs']:
        case['outputs'][first.replace('blocks.0', 'blocks.2')] = case['outputs'].pop(first)
    torch.manual_seed(0)
    golden.run(model, recorded, case)


@torch.no_grad()
def test_recorded_maps():
    recorded = probe.load('SReT_T_wo_slice')
    case, model = golden.case(recorded, 'logits_224'), golden.build('SReT_T_wo_slice')
    maps = model.forward_intermediates(probe.image(case['seed'], case['shape']), intermediates_only=True)
    for s, ours in enumerate(maps, 1):
        probe.compare(ours, case['outputs'][f'stage{s}'], 0.0, 1e-4)


# ---- parts


@pytest.mark.parametrize(('tokens', 'slices'), [(12, 4), (10, 4), (10, 8), (3, 8)])
@torch.no_grad()
def test_slices_attend_alone(tokens, slices):
    torch.manual_seed(0)
    attention, x = SlicedAttention(dim=8, num_heads=2), torch.randn(2, tokens, 8)
    size = -(-tokens // slices)
    alone = [attention(part) for part in x.split(size, 1)]
    torch.testing.assert_close(attention(x, slices), torch.cat(alone, 1))
    assert not torch.allclose(attention(x, slices), attention(x))


def test_slices_of_nothing_have_finite_gradients():
    attention, x = SlicedAttention(dim=8, num_heads=2), torch.randn(1, 10, 8, requires_grad=True)
    attention(x, 8).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in attention.parameters())


@torch.no_grad()
def test_a_permutation_is_undone():
    torch.manual_seed(0)
    attention, x = SlicedAttention(dim=8, num_heads=2), torch.randn(2, 12, 8)
    torch.manual_seed(3)
    ours = attention(x, 2, permuted=True)
    torch.manual_seed(3)
    order = torch.randperm(12)
    expected = torch.empty_like(ours)
    expected[:, order] = attention(x[:, order], 2)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(attention(x, 1, permuted=True), attention(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ('permute', 'in_training', 'in_evaluation'),
    [('train', True, False), ('always', True, True), ('never', False, False)],
)
def test_when_permutations_are_drawn(permute, in_training, in_evaluation):
    model, x = small(permute=permute), torch.randn(1, 3, 64, 64)
    for norm in (model.downsample_layers[0].bn1, model.downsample_layers[0].bn2, model.downsample_layers[0].bn3):
        norm.momentum = 0.0
    assert torch.equal(model(x), model(x)) != in_evaluation
    model.train()
    assert torch.equal(model(x), model(x)) != in_training


@torch.no_grad()
def test_blocks_run_twice_and_projections_once():
    model, runs = small(depths=(1, 2, 1)), []
    for name, module in model.named_modules():
        if re.search(r'\.(block|projections\.\d)$', name):
            module.register_forward_pre_hook(lambda module, inputs, name=name: runs.append(name))
    model(torch.randn(1, 3, 32, 32))
    expected = []
    for name in ('stages.0.0', 'stages.1.0', 'stages.1.1', 'stages.2.0'):
        expected += [f'{name}.block', f'{name}.projections.0', f'{name}.block', f'{name}.projections.1']
    assert runs == expected


@torch.no_grad()
def test_stem_without_batch_norms():
    torch.manual_seed(0)
    stem, x = ConvStem(3, 8, grid=(4, 4)), torch.randn(2, 3, 32, 32)
    stem.train()(x)  # so that the statistics are not 0 and 1
    expected = stem.eval()(x)
    folded = copy.deepcopy(stem).for_deploy()
    assert isinstance(folded.bn1, torch.nn.Identity)
    torch.testing.assert_close(folded(x), expected)


def test_weights_for_another_image_size():
    state = small(img_size=64).state_dict()
    assert load_checkpoint(small(img_size=(64, 96)), state).downsample_layers[0].pos_embed.table.shape == (1, 96, 16)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'permute': 'alway'}, "permute must be one of always, never, train, got 'alway'; did you mean always?"),
        ({'dims': (16, 32, 40)}, 'dims must be multiples of those before them, got 40 after 32'),
        ({'num_heads': 3}, 'num_heads must divide dim, got num_heads=3, dim=16'),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message.replace('?', r'\?')):
        small(**arguments)
