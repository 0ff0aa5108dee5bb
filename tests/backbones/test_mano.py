"""Without this multipole attention could lose a level, weigh levels wrongly, or see less than the whole map."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import build_mixer
from densezoo.backbones.swin import Swin, WindowAttention


def multipole(**options):
    torch.manual_seed(0)
    return build_mixer({'name': 'multipole', 'num_heads': 2, 'window_size': 2, **options}, dim=8)


@torch.no_grad()
def test_one_level_is_window_attention():
    ours = multipole(levels=1)
    theirs = WindowAttention(dim=8, num_heads=2, window_size=2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@torch.no_grad()
def test_levels_add_up_from_the_coarsest():
    """Three levels written out, with the factors 1 and 1/2."""
    mixer = multipole(levels=3)
    local = multipole(levels=1)
    local.load_state_dict({key: value for key, value in mixer.state_dict().items() if key in local.state_dict()})
    x = torch.randn(2, 8, 12, 8)
    half = F.conv2d(x.permute(0, 3, 1, 2), mixer.down.weight, stride=2).permute(0, 2, 3, 1)
    quarter = F.conv2d(half.permute(0, 3, 1, 2), mixer.down.weight, stride=2).permute(0, 2, 3, 1)

    def up(m):
        return F.conv_transpose2d(m.permute(0, 3, 1, 2), mixer.up.weight, stride=2).permute(0, 2, 3, 1)

    expected = local(x) + 0.5 * up(local(half) + up(local(quarter)))
    torch.testing.assert_close(mixer(x), expected)


def test_every_position_sees_the_whole_map():
    mixer = multipole(levels=3).double()
    for height, width, whole in ((8, 8, True), (7, 5, True), (16, 16, False)):
        x = torch.randn(1, height, width, 8, dtype=torch.float64, requires_grad=True)
        seen = torch.autograd.grad(mixer(x)[0, 0, 0].sum(), x)[0].abs().sum(-1) > 0
        assert bool(seen.all()) == whole  # two windows of the coarsest level are 16 positions high


@torch.no_grad()
def test_positions_outside_are_not_attended_to():
    mixer = multipole(levels=1)
    x = torch.randn(1, 3, 3, 8)
    corner = x[:, 2:, 2:]  # alone in its window
    torch.testing.assert_close(mixer(x)[:, 2:, 2:], mixer.proj(mixer.qkv(corner)[..., 16:]))


@pytest.mark.parametrize(('name', 'params'), [('mano_tiny', 36.10), ('mano_small', 71.58), ('mano_base', 126.83)])
def test_sizes(name, params):
    """Swin's parameters and, in the first three stages, two 2x2 convolutions in each block."""
    with torch.device('meta'):
        model = create_model(name)
        swin = create_model(f'swin_{name.removeprefix("mano_")}_patch4_window7_224')
    extra = sum(
        8 * dim * dim * len(stage) for dim, stage in zip(model.feature_info.channels()[:3], model.stages, strict=False)
    )
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(params, abs=0.01)
    assert count == sum(p.numel() for p in swin.parameters()) + extra
    assert [stage[0].token_mixer.levels for stage in model.stages] == [4, 3, 2, 1]


@torch.no_grad()
def test_weights_of_swin_fit():
    swin = create_model('swin_tiny_patch4_window7_224', num_classes=7, **Swin.reduced)
    mano = create_model('mano_tiny', num_classes=7, **Swin.reduced)
    load_checkpoint(mano, swin.state_dict(), strict=False)
    missing = {key.split('.')[-2] for key in mano.state_dict().keys() - swin.state_dict().keys()}
    assert missing == {'down', 'up'} and swin.state_dict().keys() < mano.state_dict().keys()
    key = 'stages.0.0.token_mixer.qkv.weight'
    assert torch.equal(mano.state_dict()[key], swin.state_dict()[key])


@torch.no_grad()
def test_in_another_family():
    model = create_model(
        'poolformer_s12',
        features_only=True,
        depths=(1, 1, 1, 1),
        dims=(16, 24, 32, 40),
        mixers=('pool', 'multipole') * 2,
    ).eval()
    assert [tuple(m.shape[2:]) for m in model(torch.randn(1, 3, 70, 90))] == [(18, 23), (9, 12), (5, 6), (3, 3)]


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'num_heads': 3}, 'num_heads must divide dim, got num_heads=3, dim=8'),
        ({'levels': 0}, 'levels and window_size must be positive, got levels=0, window_size=2'),
    ],
)
def test_arguments_that_cannot_be_built(options, text):
    with pytest.raises(ValueError, match=text):
        multipole(**options)
