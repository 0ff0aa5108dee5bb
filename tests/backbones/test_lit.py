"""Without this LIT's positions, its token merging or its dense forms could drift from the published system."""

import golden
import probe
import pytest
import torch
from merging import TransposedGradient, transposed, without_padding
from torch import nn

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import deform
from densezoo.backbones.layers.deform import DeformableMerging, merge_reference, merge_torchvision
from densezoo.backbones.lit import RelativeAttention, resize_table
from densezoo.backbones.lit_ti import resize_embedding
from densezoo.kernels import use

SMALL = {'depths': (1, 1, 2, 1), 'dims': (32, 64, 96, 128), 'num_heads': (1, 2, 3, 4), 'num_classes': 5}

# ---- goldens


def test_recorded_gradients_of_relative_positions(monkeypatch):
    monkeypatch.setattr(DeformableMerging, 'forward', transposed)
    recorded = probe.load('lit_s')
    golden.run(golden.build('lit_s'), recorded, golden.case(recorded, 'grad_224'))


def test_recorded_gradients_of_absolute_positions():
    """Position embeddings straighten the gradient's layout, so that the last merging alone met the error."""
    recorded = probe.load('lit_ti')
    model = golden.build('lit_ti')
    norm = model.downsample_layers[3][0].norm_layer
    hooks = [
        norm.register_forward_pre_hook(lambda module, inputs: inputs[0].contiguous()),
        norm.register_forward_hook(lambda module, inputs, out: TransposedGradient.apply(out)),
    ]
    try:
        golden.run(model, recorded, golden.case(recorded, 'grad_224'))
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ('name', 'case_name'),
    [
        ('lit_s__dense', 'features_198x262'),
        ('lit_s__dense_det', 'features_198x262'),
        ('lit_ti__dense', 'features_198x262'),
        pytest.param('lit_s__dense', 'features_200x264', marks=pytest.mark.slow),
        pytest.param('lit_s__dense_det', 'features_200x264', marks=pytest.mark.slow),
        pytest.param('lit_ti__dense', 'features_200x264', marks=pytest.mark.slow),
    ],
)
def test_maps_whose_border_the_authors_drop(name, case_name):
    recorded = probe.load(name)
    model = load_checkpoint(golden.create(name).eval(), probe.golden_state(recorded))
    stem = model.downsample_layers[0]
    without_padding(model)
    if name.startswith('lit_s'):
        stem.drops_border = True  # their stem pads
    golden.run(model, recorded, golden.case(recorded, case_name))


def test_another_image_size():
    recorded = probe.load('lit_s__img256x320')
    model = create_model('lit_s', img_size=(256, 320)).eval()
    assert sum(p.numel() for p in model.parameters()) == recorded['params']
    load_checkpoint(model, probe.golden_state(recorded))
    golden.run(model, recorded, golden.case(recorded, 'logits_256x320'))


def test_recorded_offsets():
    recorded = probe.load('lit_ti')
    case = golden.case(recorded, 'dtm_offsets_224')
    model, seen = golden.build('lit_ti'), {}
    hooks = [
        model.downsample_layers[s][0].dconv.conv_offset.register_forward_hook(
            lambda module, inputs, out, s=s: seen.update({f'offset{s + 1}': out})
        )
        for s in (1, 2, 3)
    ]
    with torch.no_grad():
        model(probe.image(case['seed'], case['shape']))
    for hook in hooks:
        hook.remove()
    for key, stored in case['outputs'].items():
        probe.compare(seen[key], stored, case['fp32_vs_fp64_maxdiff_over_std'][key] * stored['std'])


@pytest.mark.parametrize('case_name', ['dtm_14x14', 'dtm_15x17', 'grad_14x14'])
def test_recorded_token_merging(case_name, monkeypatch):
    recorded = probe.load('lit_dtm_module')
    case = golden.case(recorded, case_name)
    module = DeformableMerging(64, 128).eval()
    module.load_state_dict(probe.golden_state(recorded), strict=False)
    x = probe.image(case['seed'], case['shape']).requires_grad_()
    if case_name.startswith('grad'):
        monkeypatch.setattr(DeformableMerging, 'forward', transposed)
        loss = without_padding(module)(x.permute(0, 2, 3, 1)).square().mean()
        loss.backward()
        probe.compare(loss, case['outputs']['loss'])
        outputs = {'grad_input': x.grad, **{f'grad_{key}': p.grad for key, p in module.named_parameters()}}
        for key in case['outputs'].keys() - {'loss'}:
            probe.compare(outputs[key], case['outputs'][key], relative=1e-3)
        return
    assert sum(p.numel() for p in module.parameters()) == recorded['params']
    with torch.no_grad():
        tokens = without_padding(module)(x.permute(0, 2, 3, 1)).flatten(1, 2)
        offset = module.dconv.conv_offset(x)
    for key, ours in {'tokens': tokens, 'offset': offset}.items():
        probe.compare(ours, case['outputs'][key])


# ---- token merging


@pytest.mark.parametrize('size', [(2, 2), (3, 5), (6, 8)])
def test_both_ways_of_merging_agree(size):
    """Offsets far beyond the border too; values, and gradients of everything."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, *size).requires_grad_()
    offset = (3 * torch.randn(3, 8, size[0] // 2, size[1] // 2)).requires_grad_()
    weight, bias = torch.randn(6, 5, 2, 2).requires_grad_(), torch.randn(6).requires_grad_()
    outputs = [merge(x, offset, weight, bias) for merge in (merge_reference, merge_torchvision)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5 * outputs[1].abs().max().item())
    gradients = [torch.autograd.grad(out.square().sum(), (x, offset, weight, bias)) for out in outputs]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_gradient_of_one_image_in_evaluation_mode():
    """The case in which PyTorch errs in the authors' layout: ours must not depend on the batch."""
    torch.manual_seed(0)
    module = DeformableMerging(4, 6).eval()
    nn.init.normal_(module.dconv.conv_offset.weight)
    nn.init.uniform_(module.norm_layer.running_var, 0.5, 2)
    x = torch.randn(2, 6, 8, 4).requires_grad_()
    (together,) = torch.autograd.grad(module(x).square().sum(), x)
    alone = [torch.autograd.grad(module(x[i : i + 1]).square().sum(), x)[0][i] for i in range(2)]
    torch.testing.assert_close(torch.stack(alone), together)


def test_padding_adds_to_odd_maps_and_changes_nothing_else():
    torch.manual_seed(0)
    module = DeformableMerging(4, 6).eval()
    nn.init.normal_(module.dconv.conv_offset.weight)
    x = torch.randn(2, 7, 9, 4)
    with torch.no_grad():
        ours = module(x)
        theirs = without_padding(module)(x)
    assert ours.shape == (2, 4, 5, 6) and theirs.shape == (2, 3, 4, 6)
    torch.testing.assert_close(ours[:, :3, :4], theirs)


def test_choice_of_operator(monkeypatch):
    """Exports never hold torchvision's operator; elsewhere it is taken where it does not refuse."""
    called = []
    monkeypatch.setattr(deform, 'merge_torchvision', lambda *tensors: called.append(1) or merge_torchvision(*tensors))
    module, x = DeformableMerging(4, 6).eval(), torch.randn(2, 4, 4, 4)
    assert 'CPU' in deform.refuses_torchvision(x)
    module(x)
    assert not called
    monkeypatch.setattr(deform, 'refuses_torchvision', lambda x: None)
    module(x)
    assert called == [1]
    with use('torch'):
        module(x)
    assert called == [1]


# ---- positions


def test_bias_is_the_tables_row_of_each_offset():
    H, W = 3, 4
    mixer = RelativeAttention(dim=8, num_heads=2, grid=(H, W))
    bias = mixer.bias(H, W)
    for i in range(H * W):
        for j in range(H * W):
            down, right = i // W - j // W, i % W - j % W
            row = (down + H - 1) * (2 * W - 1) + right + W - 1
            assert torch.equal(bias[:, i, j], mixer.relative_position_bias_table[row])


def test_tables_and_embeddings_keep_their_values_at_their_own_size():
    table, embedding = torch.randn(5 * 7, 2), torch.randn(1, 3 * 4, 8)
    assert resize_table(table, (3, 4), (3, 4)) is table
    assert resize_embedding(embedding, (3, 4), (3, 4)) is embedding
    larger = resize_table(table, (3, 4), (5, 6))
    assert larger.shape == (9 * 11, 2)
    torch.testing.assert_close(larger.view(9, 11, 2)[4, 5], table.view(5, 7, 2)[2, 3])  # offset 0 stays in the middle
    assert resize_embedding(embedding, (3, 4), (5, 6)).shape == (1, 30, 8)


@pytest.mark.parametrize('name', ['lit_s', 'lit_ti'])
def test_weights_for_another_image_size_load(name):
    small = create_model(name, img_size=64, **SMALL).eval()
    large = load_checkpoint(create_model(name, img_size=128, **SMALL).eval(), small.state_dict())
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-5)
    misfit = create_model(name, img_size=(64, 128), **SMALL).state_dict()
    with pytest.raises(ValueError, match='of another shape'):
        load_checkpoint(large, misfit)


def test_dense_forms_have_tables_of_their_own():
    with torch.device('meta'):
        sides = {dense: create_model('lit_s', features_only=True, dense=dense) for dense in ('seg', 'det')}
    assert sides['seg'].stages[2][0].token_mixer.grid == (32, 32)
    assert sides['det'].stages[2][0].token_mixer.grid == (50, 50)
    assert list(sides['seg'].output_norms) == ['0', '1', '2', '3']
    assert list(sides['det'].output_norms) == ['1', '2', '3']


def test_class_token_is_no_position():
    model = create_model('lit_ti', img_size=64, **SMALL).eval()
    x = torch.randn(2, 3, 70, 100)
    with torch.no_grad():
        features = model.forward_features(x)
        last, maps = model.forward_intermediates(x)
        channels_last = model.forward_intermediates(x, [3], output_fmt='NHWC', intermediates_only=True)[0]
    assert features.shape == (2, 128, 1, 1 + 3 * 4) and torch.equal(last, features)
    assert maps[3].shape == (2, 128, 3, 4)
    assert torch.equal(maps[3].flatten(2), features[:, :, 0, 1:])
    assert torch.equal(channels_last, maps[3].permute(0, 2, 3, 1))
    assert model.no_weight_decay() == {'downsample_layers.3.1.cls_token'}


# ---- paper facts, errors, elsewhere


@pytest.mark.parametrize(('name', 'millions'), [('lit_ti', 19.9), ('lit_s', 28.0), ('lit_m', 49.4), ('lit_b', 87.3)])
def test_parameter_counts(name, millions):
    with torch.device('meta'):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_offsets_start_at_zero():
    model = create_model('lit_s', img_size=64, **SMALL)
    for layer in model.downsample_layers[1:]:
        assert not layer.dconv.conv_offset.weight.any() and not layer.dconv.conv_offset.bias.any()
        assert layer.dconv.weight.std() > 0


def test_relative_attention_in_another_family():
    model = create_model(
        'poolformer_s12',
        depths=(1, 1, 1, 1),
        dims=(32, 32, 64, 64),
        mixers=('pool', 'pool', 'pool', 'relative_attention'),
    )
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1000)


@pytest.mark.parametrize(
    ('name', 'overrides', 'text'),
    [
        (
            'lit_s',
            {'num_heads': (3, 6, 5, 24)},
            'num_heads must divide .* got num_heads=5, dim=384',
        ),
        (
            'lit_ti',
            {'num_heads': (1, 2, 5, 7)},
            'num_heads must divide .* got num_heads=7, dim=512',
        ),
        ('lit_s', {'dense': 'dat'}, "dense must be one of det, seg, got 'dat'; did you mean"),
        ('lit_s', {'mixers': ('pool', 'pool', 'hilow', 'pool')}, "mixer must be one of .* got 'hilow'"),
    ],
)
def test_bad_arguments(name, overrides, text):
    with torch.device('meta'), pytest.raises(ValueError, match=text):
        create_model(name, **overrides)
