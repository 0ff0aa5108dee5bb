"""Without this recursive gated convolutions and filters could drift from the authors' modules, at any size of map."""

import golden
import probe
import pytest
import torch

from densezoo.backbones import AnySize, Resampled, create_model, load_checkpoint
from densezoo.backbones.hornet import GlobalLocalFilter, GnConv

MODULES = {
    'hornet_global_local_filter': lambda: GlobalLocalFilter(64, grid=(14, 14)),
    'hornet_gnconv_order2': lambda: GnConv(dim=64, order=2),
    'hornet_gnconv_order5': lambda: GnConv(dim=64, order=5),
    'hornet_gnconv_gf_order4': lambda: GnConv(dim=64, order=4, filters=True, grid=(14, 14)),
}
CASES = [(name, case['name']) for name in MODULES for case in probe.load(name)['cases']]
DENSE = ['hornet_tiny_7x7__dense', 'hornet_tiny_gf__dense', 'hornet_tiny_gf__dense_seg']
PARAMS = {  # in 1e6; large: published with the 10450 classes it was trained on
    'hornet_tiny_7x7': (22, 1000),
    'hornet_tiny_gf': (23, 1000),
    'hornet_small_7x7': (50, 1000),
    'hornet_small_gf': (50, 1000),
    'hornet_base_7x7': (87, 1000),
    'hornet_base_gf': (88, 1000),
    'hornet_large_7x7': (209, 10450),
    'hornet_large_gf': (211, 10450),
    'hornet_large_gf_img384': (216, 10450),
}
SMALL = {'depths': (1, 1, 1, 1), 'dims': (32, 64, 96, 128)}


@pytest.mark.parametrize(('name', 'case_name'), CASES)
@torch.no_grad()
def test_modules(name, case_name):
    recorded = probe.load(name)
    case = golden.case(recorded, case_name)
    module = load_checkpoint(MODULES[name](), probe.golden_state(recorded))
    assert sum(p.numel() for p in module.parameters()) == recorded['params']
    out = module(probe.image(case['seed'], case['shape']).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    probe.compare(out.contiguous(), case['outputs']['out'])


@pytest.mark.parametrize('name', DENSE)
def test_dense_forms_where_authors_drop_borders(name):
    """At 200x264 the authors' convolutions drop the last row or column from stride 16 on."""
    recorded = probe.load(name)
    model = golden.create(name).eval()
    load_checkpoint(model, probe.golden_state(recorded))
    for downsample in model.downsample_layers:
        downsample.drops_border = False
    golden.run(model, recorded, golden.case(recorded, 'features_200x264'))


@pytest.mark.parametrize('name', PARAMS)
def test_published_sizes(name):
    millions, classes = PARAMS[name]
    with torch.device('meta'):
        model = create_model(name, num_classes=classes)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize('order', [1, 2, 3, 4, 5, 6])
def test_gnconv_formula(order):
    torch.manual_seed(0)
    mixer, x = GnConv(dim=32, order=order, scale=0.5).double(), torch.randn(2, 5, 6, 32, dtype=torch.float64)
    widths = [32 // 2 ** (order - 1 - i) for i in range(order)]
    assert mixer.widths == widths
    parts = mixer.proj_in(x).split([widths[0], sum(widths)], -1)
    conv = mixer.dwconv
    mixed = torch.nn.functional.conv2d(
        parts[1].permute(0, 3, 1, 2), conv.weight, conv.bias, padding=3, groups=sum(widths)
    )
    factors = (0.5 * mixed.permute(0, 2, 3, 1)).split(widths, -1)
    out = parts[0] * factors[0]
    for linear, factor in zip(mixer.pws, factors[1:], strict=True):
        out = linear(out) * factor
    torch.testing.assert_close(mixer(x), mixer.proj_out(out))


def test_sizes_and_filters():
    with torch.device('meta'):
        plain, filtered = create_model('hornet_tiny_7x7'), create_model('hornet_tiny_gf')
        dense = create_model('hornet_tiny_gf', features_only=True)
        seg = create_model('hornet_tiny_gf', features_only=True, dense='seg')
        other = create_model('hornet_tiny_gf', img_size=(256, 320))
        large = create_model('hornet_base_gf_img384')
    assert isinstance(plain.sizes, AnySize) and not isinstance(plain.sizes, Resampled)
    assert isinstance(filtered.sizes, Resampled)
    shapes = {(14, 8): (filtered, dense), (24, 13): (seg, large), (16, 11): (other,)}
    for shape, models in shapes.items():
        for model in models:
            assert model.stages[2][0].token_mixer.dwconv.complex_weight.shape[1:3] == shape


@pytest.mark.parametrize('mixer', ['gnconv', {'name': 'gnconv', 'order': 4, 'filters': True}])
def test_mixer_in_another_family(mixer):
    model = create_model('poolformer_s12', **SMALL, mixers=mixer, features_only=True)
    assert [m.shape[1:] for m in model(torch.randn(1, 3, 33, 65))] == [(32, 9, 17), (64, 5, 9), (96, 3, 5), (128, 2, 3)]
    hybrid = create_model('hornet_tiny_7x7', **SMALL, mixers=('gnconv', 'gnconv', 'pool', 'attention'))
    assert hybrid(torch.randn(1, 3, 40, 32)).shape == (1, 1000)


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        ({'orders': (2, 3, 4, 6), 'dims': (64, 128, 256, 48)}, r'multiple of 2\^\(n - 1\) .*got order=6, dim=48'),
        ({'orders': 0}, 'got order=0, dim=64'),
        ({'dense': 'both'}, "dense must be 'det' or 'seg', got dense='both'"),
        ({'orders': (1, 1, 1, 1), 'dims': (3, 6, 12, 24), 'filters': True}, 'even number of channels, got dim=3'),
    ],
)
def test_what_cannot_be_built(arguments, text):
    with torch.device('meta'), pytest.raises(ValueError, match=text):
        create_model('hornet_tiny_7x7', **arguments)
