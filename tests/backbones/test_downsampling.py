"""Without this LIT's deformable merging could not take the place of another family's downsampling, or would take it
where that layer does more."""

import pytest
import torch

from densezoo.backbones import create_model
from densezoo.backbones.layers.deform import DeformableMerging
from densezoo.backbones.registry import model_class
from densezoo.deploy import export_program
from densezoo.train.optim import learning_rate_scales


def small(name, **overrides):
    torch.manual_seed(0)
    return create_model(name, **{**model_class(name).reduced, **overrides}).eval()


@pytest.mark.parametrize(
    'name', ['swin_tiny_patch4_window7_224', 'poolformer_s12', 'caformer_s18', 'stvit_r_swin_tiny']
)
def test_deformable_merging_between_the_stages(name):
    model = small(name, features_only=True, downsampling='deformable')
    assert [type(layer) for layer in model.downsample_layers[1:]] == [DeformableMerging] * 3
    x = torch.randn(2, 3, 75, 98)
    maps = model(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(19, 25), (10, 13), (5, 7), (3, 4)]
    sum(m.square().sum() for m in maps).backward()
    offsets = [p for key, p in model.named_parameters() if 'conv_offset' in key]
    assert len(offsets) == 6 and all(p.grad.any() for p in offsets)
    assert learning_rate_scales(model) == {'downsample_layers.*.conv_offset.weight': 0.01}
    assert learning_rate_scales(small(name)) == {}


@pytest.mark.slow
@torch.no_grad()
def test_exports():
    model, x = small('poolformer_s12', features_only=True, downsampling='deformable'), torch.randn(1, 3, 64, 96)
    for layer in model.downsample_layers[1:]:
        layer.dconv.conv_offset.weight.normal_(std=0.1)
    for ours, expected in zip(export_program(model, x).module()(x), model(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ('name', 'overrides', 'message'),
    [
        (
            'swin_tiny_patch4_window7_224',
            {'downsampling': 'deform'},
            "downsampling must be one of deformable, got 'deform'",
        ),
        ('deit_tiny_patch16_224', {}, 'deit_tiny_patch16_224 has one resolution and no downsampling'),
        ('litv2_s', {}, r'LITv2 keeps its own downsampling, .* or is deformable already'),
        ('pvt_tiny', {}, r'PVT keeps its own downsampling, got downsampling=.deformable.: its \w+ before stage 1'),
        ('resnet18', {}, "resnet18 is timm's, whose downsampling stays"),
        (
            'swin_tiny_patch4_window7_224',
            {'pretrained': True},
            'published weights have the downsampling of their family',
        ),
    ],
)
def test_errors(name, overrides, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        create_model(name, **{'downsampling': 'deformable', **overrides})
