"""Without this a shared part could be wrong in a way that every family hides: borders, norms, scales, mixers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densezoo.backbones.layers import (
    MIXERS,
    NORMS,
    Attention,
    ConvDownsample,
    ConvMlp,
    JointNorm,
    LayerNorm,
    MetaFormerBlock,
    Mlp,
    RandomMixer,
    SepConv,
    StarReLU,
    build_mixer,
    drop_path_schedule,
    mixer,
)
from densezoo.backbones.layers.conv import ConvNorm
from densezoo.backbones.layers.grid import ceil_div, pad_bottom_right, padded


@pytest.mark.parametrize(('size', 'multiple'), [(1, 4), (4, 4), (5, 4), (7, 7), (8, 7), (31, 32), (33, 32)])
def test_ceil_first_sizes(size, multiple):
    assert ceil_div(size, multiple) == -(-size // multiple)
    assert padded(size, multiple) % multiple == 0 and 0 <= padded(size, multiple) - size < multiple
    x = torch.ones(1, 2, size, 3)
    assert pad_bottom_right(x, multiple).shape == (1, 2, padded(size, multiple), padded(3, multiple))
    assert pad_bottom_right(x, multiple).sum() == x.sum() and pad_bottom_right(x, 1) is x


@torch.no_grad()
@pytest.mark.parametrize(('kernel', 'stride', 'padding'), [(7, 4, 2), (7, 4, 3), (3, 2, 1), (4, 4, 0), (2, 2, 0)])
def test_downsampling_is_the_convolution_and_never_drops_a_border(kernel, stride, padding):
    layer = ConvDownsample(3, 8, kernel=kernel, stride=stride, padding=padding, image=True)
    for size in range(32, 41):
        x = torch.randn(1, 3, size, 64)
        ours, bare = layer(x).permute(0, 3, 1, 2), F.conv2d(x, layer.conv.weight, layer.conv.bias, stride, padding)
        assert ours.shape[2:] == (ceil_div(size, stride), 64 // stride)
        rows = min(bare.shape[2], ours.shape[2])
        torch.testing.assert_close(ours[:, :, :rows], bare[:, :, :rows])
        bottom = torch.randn(1, 3, size, 64)
        bottom[:, :, :-1] = x[:, :, :-1]  # another last row of pixels must be noticed
        assert not torch.equal(layer(bottom), layer(x))


@torch.no_grad()
@pytest.mark.parametrize('name', [name for name, make in NORMS.items() if isinstance(make(1), LayerNorm | JointNorm)])
def test_norms(name):
    norm, x = NORMS[name](6), torch.randn(2, 3, 4, 6, dtype=torch.float64) * 5 + 2
    norm.double().weight.uniform_(0.5, 1.5)
    if norm.bias is not None:
        norm.bias.uniform_(-1, 1)
    over = (1, 2, 3) if isinstance(norm, JointNorm) else (3,)
    expected = (x - x.mean(over, keepdim=True)) / (x.var(over, keepdim=True, correction=0) + norm.eps).sqrt()
    expected = expected * norm.weight + (0 if norm.bias is None else norm.bias)
    torch.testing.assert_close(norm(x), expected)
    assert ('no_bias' in name) == (norm.bias is None)
    assert norm.eps == (1e-5 if name in ('joint', 'layer_eps5') else 1e-6)


def test_star_relu_has_one_value_with_and_without_gradients():
    act, x = StarReLU(), torch.randn(4, 5)
    with torch.no_grad():
        act.scale.fill_(0.9)
        act.bias.fill_(-0.4)
        kept = x.clone()
        without = act(x)
        assert torch.equal(x, kept)  # works on its own copy
    torch.testing.assert_close(without, 0.9 * x.clamp(min=0) ** 2 - 0.4)
    torch.testing.assert_close(act(x), without)


def test_drop_path_schedule():
    assert drop_path_schedule((1, 2, 2), 0.4) == [[0.0], pytest.approx([0.1, 0.2]), pytest.approx([0.3, 0.4])]
    assert drop_path_schedule((1,), 0.4) == [[0.0]]


@torch.no_grad()
def test_block_formula():
    dim = 8
    x, branch = torch.randn(2, 3, 5, dim), nn.Linear(dim, dim)
    for layer_scale, res_scale in ((None, None), (0.5, None), (None, 2.0), (0.5, 2.0)):
        block = MetaFormerBlock(
            dim=dim, norm=NORMS['layer'], mixer=branch, mlp=Mlp(dim=dim), layer_scale=layer_scale, res_scale=res_scale
        )
        s, a = layer_scale or 1.0, res_scale or 1.0
        middle = a * x + s * branch(block.norm1(x))
        torch.testing.assert_close(block(x), a * middle + s * block.mlp(block.norm2(middle)))


@torch.no_grad()
def test_attention_is_softmax_over_all_positions():
    layer, x = Attention(dim=64, head_dim=32).double(), torch.randn(2, 3, 4, 64, dtype=torch.float64)
    query, key, value = layer.qkv(x.flatten(1, 2)).chunk(3, -1)
    out = []
    for head in range(2):
        q, k, v = (t[..., 32 * head : 32 * head + 32] for t in (query, key, value))
        out.append(torch.softmax(q @ k.transpose(1, 2) * 32**-0.5, -1) @ v)
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(out, -1)).reshape(x.shape))


@torch.no_grad()
def test_sep_conv_reaches_half_its_kernel():
    layer, x = SepConv(dim=8), torch.randn(1, 15, 15, 8)
    other = x.clone()
    other[0, 7, 7] += 1
    changed = (layer(x) - layer(other)).abs().amax(-1)[0] > 1e-6
    assert changed[4:11, 4:11].any() and not changed[:4].any() and not changed[11:].any() and not changed[:, :4].any()


@torch.no_grad()
def test_random_mixer_rows_are_weights_and_are_not_trained():
    layer = RandomMixer(dim=3, grid=(2, 3))
    torch.testing.assert_close(layer.random_matrix.sum(1), torch.ones(6))
    assert not layer.random_matrix.requires_grad
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(layer(x)[1].flatten(0, 1), layer.random_matrix @ x[1].flatten(0, 1))
    with pytest.raises(ValueError, match=r'made for a map of \(2, 3\), got \(3, 2\)'):
        layer(x.transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize('name', MIXERS)
def test_every_mixer_keeps_shape(name):
    x = torch.randn(2, 4, 6, 32)
    assert build_mixer(name, dim=32, grid=(4, 6))(x).shape == x.shape


def test_mixers_are_registered_once():
    with pytest.raises(ValueError, match="mixer 'pool' is already registered"):
        mixer('pool')(nn.Identity)


@pytest.mark.parametrize('options', [dict(act='gelu'), dict(act='hardswish', norm=False, bias=True)])
@torch.no_grad()
def test_hooks_see_what_is_computed_in_one_step(options):
    """Calibration, for one, watches convolutions and activations by hooks, in evaluation and without gradients."""
    torch.manual_seed(0)
    layer, x, seen = ConvNorm(8, 8, kernel=3, **options).eval(), torch.randn(2, 8, 9, 7), []
    expected = layer(x)
    for part in (layer.conv, layer.act):
        handle = part.register_forward_hook(lambda module, args, out: seen.append(out))
        torch.testing.assert_close(layer(x), expected)
        handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], expected)
    mlp, seen = ConvMlp(dim=4), []
    mlp.dwconv.register_forward_hook(lambda module, args, out: seen.append(out))
    mlp(torch.randn(1, 5, 6, 4))
    assert seen[0].shape == (1, 16, 5, 6)


@torch.no_grad()
def test_layers_in_the_place_of_a_convolution_are_called():
    layer = ConvNorm(3, 3, kernel=3, act='relu', norm=False)
    layer.conv = nn.Sequential(layer.conv, nn.Threshold(0.1, 5.0))
    assert (layer(torch.randn(1, 3, 6, 6)) >= 0.1).all()
