"""Without this a head could be told strides or widths that the neck's maps do not have."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones.hornet import GnConv
from densezoo.backbones.litv2 import HiLo
from densezoo.heads import FPN, PyramidInfo
from densezoo.heads.pyramid import norm_layer

INFO = PyramidInfo([16, 16, 16], [8, 16, 32])


def maps(size=(200, 264)):
    torch.manual_seed(0)
    return [torch.randn(2, 16, -(-size[0] // s), -(-size[1] // s)) for s in INFO.reduction()]


@pytest.mark.parametrize('norm', ['none', 'group', 'batch'])
@pytest.mark.parametrize(('extra', 'strides'), [('none', []), ('maxpool', [64]), ('p6p7', [64, 128])])
def test_outgoing_maps_are_as_declared(extra, strides, norm):
    neck = FPN(feature_info=INFO, out_channels=24, extra=extra, norm=norm)
    info = neck.feature_info
    assert info.reduction() == [8, 16, 32, *strides] and info.channels() == [24] * (3 + len(strides))
    out = neck(maps())
    info.check(out)
    assert isinstance(out, list)
    for x, stride in zip(out, info.reduction(), strict=True):
        assert x.shape == (2, 24, -(-200 // stride), -(-264 // stride))
    sum(x.square().mean() for x in out).backward()
    assert all(p.grad is not None for p in neck.parameters())


@pytest.mark.parametrize(('source', 'relu'), [('input', True), ('output', False), ('lateral', False)])
def test_source_of_extra_levels_does_not_depend_on_widths(source, relu):
    neck = FPN(feature_info=INFO, out_channels=16, extra='p6p7', extra_source=source, extra_relu=relu)
    features = maps()
    out = neck(features)
    source = {'input': features[2], 'output': out[2], 'lateral': neck.inner_blocks[2](features[2])}[source]
    p6 = neck.extra_blocks.p6(source)
    torch.testing.assert_close(out[3], p6)
    torch.testing.assert_close(out[4], neck.extra_blocks.p7(F.relu(p6) if relu else p6))


@pytest.mark.parametrize('extra', ['maxpool', 'p6p7'])
def test_as_many_extra_levels_as_wanted(extra):
    neck = FPN(feature_info=INFO, out_channels=16, extra=extra, extra_levels=3)
    out = neck(maps())
    assert neck.feature_info.reduction() == [8, 16, 32, 64, 128, 256]
    assert [tuple(x.shape[-2:]) for x in out[3:]] == [(4, 5), (2, 3), (1, 2)]
    neck.feature_info.check(out)
    (only,) = FPN(feature_info=INFO, extra=extra, extra_levels=1).feature_info.reduction()[3:]
    assert only == 64
    for options in ({'extra': extra, 'extra_levels': 0}, {'extra_levels': 2}):
        with pytest.raises(ValueError, match=r"extra_levels must be at least 1 and needs extra other than 'none', got"):
            FPN(feature_info=INFO, **options)


@pytest.mark.parametrize('extra', ['none', 'p6p7'])
@pytest.mark.parametrize(
    'mixer', [{'type': GnConv, 'order': 3}, {'type': HiLo, 'num_heads': 4}], ids=['gnconv', 'hilo']
)
def test_a_mixer_takes_the_place_of_every_output_convolution(mixer, extra):
    neck = FPN(feature_info=INFO, out_channels=24, extra=extra, norm='group', mixer=mixer)
    out = neck(maps((101, 133)))
    assert [tuple(x.shape[-2:]) for x in out[:3]] == [(13, 17), (7, 9), (4, 5)]
    neck.feature_info.check(out)
    sum(x.square().mean() for x in out).backward()
    assert all(p.grad is not None for p in neck.parameters())
    convolutions = [m for m in neck.layer_blocks.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
    assert not convolutions and len(neck.layer_blocks) == 3


@pytest.mark.parametrize(('channels', 'groups'), [(256, 32), (96, 32), (64, 32), (48, 8), (32, 16), (8, 4), (1, 1)])
def test_groups_of_a_norm(channels, groups):
    """32 as published, fewer where they would not divide the width or hold one channel each."""
    assert norm_layer('group')(channels).num_groups == groups
