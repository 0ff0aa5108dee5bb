"""Without this a stripe could see its neighbour, the position encoding could leak over a stripe's border, or padding
could go to the wrong side without any shape changing."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model
from densezoo.backbones.cswin import CrossShapedAttention, CSWin, StripeAttention

# published parameters in millions, which the authors round
FACTS = {
    'cswin_tiny': 23,
    'cswin_small': 35,
    'cswin_base': 78,
    'cswin_base_384': 78,
    'cswin_large': 173,
    'cswin_large_384': 173,
}


@pytest.mark.parametrize('name', FACTS)
def test_paper_facts(name):
    with torch.device('meta'):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(FACTS[name], abs=0.7)
    sides = [stage[0].token_mixer.attns[0].width for stage in model.stages]
    assert sides == [1, 2, 12 if '384' in name else 7, None]
    assert [len(stage[0].token_mixer.attns) for stage in model.stages] == [2, 2, 2, 1]


def by_hand(attend, qkv):
    """Stripe by stripe of the map padded with zeros on both sides."""
    B, H, W, C3 = qkv.shape
    C, h = C3 // 3, attend.num_heads
    height, width = attend.height or H, attend.width or W
    tall, wide = -H % height, -W % width
    top, left = tall // 2, wide // 2
    x = torch.zeros(B, H + tall, W + wide, C3)
    x[:, top : top + H, left : left + W] = qkv
    out = torch.zeros(B, H + tall, W + wide, C)
    for row in range(0, H + tall, height):
        for col in range(0, W + wide, width):
            here = slice(None), slice(row, row + height), slice(col, col + width)
            q, k, v = x[here].reshape(B, height * width, 3, h, C // h).permute(2, 0, 3, 1, 4)
            mixed = (q @ k.transpose(-1, -2) * (C // h) ** -0.5).softmax(-1) @ v
            value = x[here][..., 2 * C :].permute(0, 3, 1, 2)
            conv = F.conv2d(value, attend.get_v.weight, attend.get_v.bias, padding=1, groups=C)
            out[here] = mixed.transpose(1, 2).reshape(B, height, width, C) + conv.permute(0, 2, 3, 1)
    return out[:, top : top + H, left : left + W]


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (5, 2), (4, 6), (9, 10), (7, 14)])
@pytest.mark.parametrize('sides', [(None, 1), (1, None), (None, 2), (2, None), (None, 7), (7, None), (None, None)])
@torch.no_grad()
def test_stripes(sides, size):
    torch.manual_seed(0)
    attend = StripeAttention(8, 2, height=sides[0], width=sides[1]).eval()
    qkv = torch.randn(2, *size, 24)
    expected = by_hand(attend, qkv)
    torch.testing.assert_close(attend(qkv), expected, rtol=0, atol=1e-5)
    if sides != (None, None):  # what exporters of dynamic sizes see
        torch.testing.assert_close(attend._symbolic(qkv), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_halves_see_a_cross():
    """A changed position reaches its vertical stripe by one half of the channels, its horizontal one by the other."""
    torch.manual_seed(0)
    mixer = CrossShapedAttention(dim=16, num_heads=2, split_size=2).eval()
    mixer.proj = torch.nn.Identity()
    x = torch.randn(1, 4, 6, 16)
    changed = x.clone()
    changed[0, 1, 2] += 1
    moved = (mixer(changed) - mixer(x)).abs() > 1e-6
    vertical, horizontal = (half.any(-1)[0] for half in moved.chunk(2, -1))
    assert vertical.nonzero().tolist() == [[r, c] for r in range(4) for c in (2, 3)]
    assert horizontal.nonzero().tolist() == [[r, c] for r in (0, 1) for c in range(6)]


@torch.no_grad()
def test_mixer_in_another_family():
    mixers = ('pool', 'stripe', dict(name='stripe', split_size=None), dict(name='stripe', split_size=2, num_heads=4))
    model = create_model('poolformer_s12', mixers=mixers, depths=(1, 1, 1, 1), dims=(16, 32, 32, 32), num_classes=3)
    assert model.eval()(torch.randn(2, 3, 72, 64)).shape == (2, 3)


def test_another_mixer_and_norm_in_cswin():
    model = CSWin(
        **{**CSWin.reduced, 'norm': 'batch', 'mixers': ('pool', 'stripe', 'stripe', 'attention'), 'num_classes': 3}
    )
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'num_heads': 3}, r'num_heads must divide the width of its stage and be even.*got num_heads=3, dim=32'),
        ({'num_heads': 6}, r'num_heads must divide .* got num_heads=6, dim=32'),
        ({'split_size': 0}, r'split_size must be positive, or None for the whole map, got split_size=0'),
        ({'split_size': (1, 2, 7)}, r'split_size must be one value or 4, one per stage'),
    ],
)
def test_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        CSWin(**{**CSWin.reduced, **overrides})
