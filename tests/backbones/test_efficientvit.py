"""Without this EfficientViT's variants, map at stride 2, names of checkpoints or mixer could be wrong unseen."""

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.efficientvit import EfficientViT
from densezoo.backbones.layers import build_mixer
from densezoo.backbones.layers.conv import ConvNorm


@torch.no_grad()
def test_map_at_stride_2():
    """What enters the strided block of our stem is the output of the authors' first stage."""
    recorded = probe.load('efficientvit_cls_b1')
    case = golden.case(recorded, 'features_200x264')
    model, seen = golden.build('efficientvit_cls_b1'), []
    handle = model.downsample_layers[0].strided.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    golden.run(model, recorded, case)
    handle.remove()
    probe.compare(seen[0], case['outputs']['c1'])


@torch.no_grad()
@pytest.mark.parametrize('name', ['efficientvit_cls_b0', 'efficientvit_cls_b1'])
def test_few_positions(name):
    """At 128 x 128 the last stage has as many positions as a head has channels."""
    recorded = probe.load(name)
    case = golden.case(recorded, 'logits_128_quadratic_stage4')
    logits = golden.build(name)(probe.image(case['seed'], case['shape']))
    probe.compare(logits, case['outputs']['logits'])


@pytest.mark.parametrize(
    ('name', 'millions'), [('b0', 3.41), ('b1', 9.10), ('b2', 24.33), ('b3', 48.65), ('l1', 52.65), ('l2', 63.71)]
)
def test_parameters(name, millions):
    with torch.device('meta'):
        model = create_model(f'efficientvit_cls_{name}')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    epsilons = {m.eps for m in model.modules() if hasattr(m, 'eps')}
    assert epsilons == {1e-7 if name.startswith('l') else 1e-5}


def test_names_of_the_large_models():
    """Their stem is called stage 0, and stages without attention hold fused convolutions."""
    theirs = {
        'backbone.stages.0.op_list.0.conv.weight': 'downsample_layers.0.conv.conv.weight',
        'backbone.stages.0.op_list.1.main.conv1.conv.weight': 'downsample_layers.0.blocks.0.conv1.conv.weight',
        'backbone.stages.1.op_list.0.main.spatial_conv.norm.bias': 'downsample_layers.0.strided.spatial_conv.norm.bias',
        'backbone.stages.1.op_list.1.main.point_conv.norm.bias': 'stages.0.0.main.point_conv.norm.bias',
        'backbone.stages.3.op_list.0.main.depth_conv.conv.bias': 'downsample_layers.2.main.depth_conv.conv.bias',
        'backbone.stages.4.op_list.6.context_module.main.qkv.conv.weight': 'stages.3.5.context_module.qkv.conv.weight',
        'backbone.stages.4.op_list.6.local_module.main.depth_conv.conv.bias': (
            'stages.3.5.local_module.depth_conv.conv.bias'
        ),
        'head.op_list.2.norm.weight': 'head.norm.weight',
        'head.op_list.3.linear.bias': 'head.fc.bias',
    }
    with torch.device('meta'):
        own = create_model('efficientvit_cls_l1').state_dict()
    assert set(theirs.values()) <= own.keys()
    assert EfficientViT.convert(dict.fromkeys(theirs)).keys() == set(theirs.values())
    assert EfficientViT.convert(own) == own


def test_whole_checkpoints():
    """A classifier's file has its head beside the backbone; a segmentor's head is left out."""
    recorded = probe.load('efficientvit_cls_b0')
    state = probe.golden_state(recorded)
    dense = load_checkpoint(create_model('efficientvit_cls_b0', features_only=True), {'state_dict': state})
    stem = dense.downsample_layers[0].conv.conv.weight
    assert torch.equal(stem, state['backbone.input_stem.op_list.0.conv.weight'])
    segmentor = {**state, 'head.input_ops.0.op_list.0.conv.weight': torch.zeros(1)}
    load_checkpoint(dense, segmentor)


def test_folded_norms_change_nothing():
    """Eager inference folds norms into convolutions; calls that record gradients do not."""
    torch.manual_seed(0)
    for bias in (False, True):
        layer = ConvNorm(6, 8, kernel=3, stride=2, groups=2, bias=bias, act='hardswish').eval()
        for tensor in (*layer.norm.parameters(), layer.norm.running_mean, layer.norm.running_var):
            torch.nn.init.uniform_(tensor, 0.5, 2)
        x = torch.randn(2, 6, 7, 9)
        expected = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
            assert not torch.equal(layer.train()(x), expected)


@torch.no_grad()
def test_mixer_in_another_family():
    reduced = {'depths': (1, 1, 1, 1), 'dims': (32, 64, 96, 128)}
    model = create_model('poolformer_s12', mixers=('pool', 'pool', 'lite_mla', 'lite_mla'), **reduced).eval()
    assert model(torch.randn(1, 3, 64, 96)).isfinite().all()
    assert (
        build_mixer({'name': 'lite_mla', 'head_dim': 8, 'scales': (3, 5)}, dim=16)(torch.randn(1, 3, 5, 16)).ndim == 4
    )


def test_stem_of_other_weights_starts_as_identity():
    """The last norm of a residual branch starts at zero, so a new block hands its input on."""
    block = create_model('efficientvit_cls_b0', **EfficientViT.reduced).eval().stages[3][0]
    x = torch.randn(1, 2, 3, 64)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head_dim': 24}, 'head_dim must divide the channels, got head_dim=24, dim=64'),
        ({'blocks': ('mb', 'mb', 'mb', 'attn')}, "block must be one of .*got 'attn'; did you mean attention"),
        ({'stem_block': 'two'}, 'stem_block must be one of separable, two_convs'),
        ({'mlp_ratio': (4, 4)}, 'mlp_ratio must be one value or 4, one per stage'),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create_model('efficientvit_cls_b0', **options)
