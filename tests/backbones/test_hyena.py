"""Without this Hyena's filters could look in the wrong direction, change with the map's size, or miss a quadrant."""

import math

import pytest
import torch

from densezoo.backbones import create_model
from densezoo.backbones.layers import build_mixer
from densezoo.kernels.long_convolution import long_convolution_reference


def hyena(**options):
    torch.manual_seed(0)
    return build_mixer({'name': 'hyena', 'filter_width': 8, **options}, dim=6, grid=(5, 6))


def authors(mixer, x):
    """The steps of the authors' layer, with their convolution towards the bottom right and their flipped copies."""
    _, H, W, C = x.shape
    first, inner, value = mixer.short_filter(mixer.in_proj(x).permute(0, 3, 1, 2)).split(C, 1)
    kernel = mixer.filter(H, W).permute(2, 0, 1)
    size = (2 * H, 2 * W)

    def convolve(u):
        spectrum = torch.fft.rfft2(u, s=size) * torch.fft.rfft2(kernel, s=size) * mixer.scale
        return torch.fft.irfft2(spectrum, s=size)[..., :H, :W] + u * mixer.bias[:, None, None]

    def run(axes):
        return (convolve((value * inner).flip(axes)) * first.flip(axes)).flip(axes)

    if mixer.direction == 'four':
        copies = torch.stack([run(axes) for axes in ((), (-1, -2), (-1,), (-2,))], -1)
        out = mixer.linear_mix(copies)[..., 0]
    else:
        out = run(() if mixer.direction == 'forward' else (-1, -2))
    return mixer.out_proj(out.permute(0, 2, 3, 1))


@pytest.mark.parametrize('filters', ['joint', 'product'])
@pytest.mark.parametrize('direction', ['forward', 'backward', 'four'])
@pytest.mark.parametrize('size', [(5, 6), (1, 1), (9, 4)])
@torch.no_grad()
def test_is_the_authors_layer(size, direction, filters):
    mixer = hyena(direction=direction, filters=filters)
    x = torch.randn(2, *size, 6)
    torch.testing.assert_close(mixer(x), authors(mixer, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('direction', 'rows', 'columns'),
    [('forward', (0, 3), (0, 4)), ('backward', (3, 6), (4, 7)), ('four', (0, 6), (0, 7))],
)
def test_what_a_position_sees(direction, rows, columns):
    """Position (3, 4) of a map of 7 x 8."""
    value = torch.randn(1, 7, 8, 6, requires_grad=True)
    out = long_convolution_reference(value, hyena(direction=direction).filters(7, 8))[0, 3, 4].sum()
    seen = torch.autograd.grad(out, value)[0].abs().sum(-1)[0].gt(1e-5).nonzero()
    assert (seen[:, 0].min(), seen[:, 0].max()) == rows and (seen[:, 1].min(), seen[:, 1].max()) == columns


@torch.no_grad()
def test_filters_keep_their_size_in_pixels():
    mixer = hyena()
    small, large = mixer.filters(5, 6), mixer.filters(9, 8)
    torch.testing.assert_close(large[4:-4, 2:-2], small)


@torch.no_grad()
def test_windows_fade():
    """Channels fall to 1% between 0.3 and 1.5 lengths of the map, along both axes alike."""
    mixer = hyena()
    implicit = mixer.filter
    implicit.network.forward = lambda features: torch.ones(*features.shape[:-1], 6)
    window = implicit(13, 16)
    torch.testing.assert_close(window[0, 0], torch.ones(6))
    torch.testing.assert_close(window[6, 0, 0].item(), 0.01)  # row 6 of grid 5: 6 / (5 - 1) = 1.5
    torch.testing.assert_close(window[0, 15, 0].item(), math.exp(math.log(0.01) / 1.5 * 3), rtol=1e-4, atol=0)
    assert (window[1, 0].diff() < 0).all()


def test_position_features():
    """The authors' with one band: the coordinate, and cosine and negative sine of a frequency of 1e-4."""
    coordinate, features = hyena().filter._features(5, 5)
    angle = torch.arange(5.0) * 2 * math.pi / 5 * 1e-4
    expected = torch.stack((torch.linspace(0, 1, 5), angle.cos(), -angle.sin()), 1)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(coordinate[:, 0], torch.linspace(0, 1, 5))


@torch.no_grad()
def test_exported_programs_hold_no_fft():
    mixer = hyena().eval()
    x = torch.randn(2, 5, 6, 6)
    program = torch.export.export(mixer, (x,))
    assert not any('fft' in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), mixer(x), rtol=0, atol=1e-5)


def test_size():
    with torch.device('meta'):
        model = create_model('hyena_tiny')
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(28.79, abs=0.01)
    assert [stage[0].token_mixer.filter.grid for stage in model.stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert all(key in model.no_weight_decay() for key, _ in model.named_parameters() if '.filter.network' in key)


@torch.no_grad()
def test_in_another_family():
    torch.manual_seed(0)
    model = create_model(
        'poolformer_s12',
        features_only=True,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 24, 32),
        mixers=('hyena', {'name': 'hyena', 'direction': 'forward'}, 'pool', 'attention'),
    ).eval()
    assert [tuple(m.shape[2:]) for m in model(torch.randn(1, 3, 70, 90))] == [(18, 23), (9, 12), (5, 6), (3, 3)]


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'direction': 'forwards'}, "direction must be one of .* got 'forwards'; did you mean forward"),
        ({'filters': 'sum'}, "filters must be one of joint, product, got 'sum'"),
    ],
)
def test_arguments_that_cannot_be_built(options, text):
    with pytest.raises(ValueError, match=text):
        hyena(**options)
