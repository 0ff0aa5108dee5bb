"""Without this linear attention could differ from the authors' where whole models hide it: in windows, in stripes, at
other sizes, in another family; or merging for deployment could change what a model computes."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.layers import build_mixer
from densezoo.backbones.layers.fold_norm import Affine
from densezoo.backbones.layers.rep_norm import PRepBN, RepBN, flatten_prepbn
from densezoo.backbones.slab import (
    HeadwiseConv,
    ReducedLinearAttention,
    SimplifiedLinearAttention,
    StripedLinearAttention,
    linear_attention,
    resampled,
)
from densezoo.deploy import fuse_for_deploy

MODULES = {
    'simplified_linear_attention': lambda: SimplifiedLinearAttention(dim=64, num_heads=2, window_size=14),
    'simplified_linear_attention__win4': lambda: SimplifiedLinearAttention(dim=64, num_heads=2, window_size=4),
    'simplified_linear_attention__pvt_sr1': lambda: ReducedLinearAttention(dim=64, num_heads=2, grid=(14, 14)),
    'simplified_linear_attention__cswin': lambda: StripedLinearAttention(64, 2, height=None, width=7, grid=(14, 14)),
}


@torch.no_grad()
@pytest.mark.parametrize('name', MODULES)
def test_modules(name):
    recorded, module = probe.load(name), MODULES[name]().eval()
    module.load_state_dict(probe.golden_state(recorded))
    assert sum(p.numel() for p in module.parameters()) == recorded['params']
    (case,) = recorded['cases']
    x, side = probe.image(case['seed'], case['shape']), int(case['shape'][-2] ** 0.5)
    x = torch.cat(list(x), -1) if name.endswith('cswin') else x  # q, k and v
    probe.compare(module(x.unflatten(1, (side, side))).flatten(1, 2), case['outputs']['out'])


@torch.no_grad()
@pytest.mark.parametrize('name', ['slab_swin_tiny', 'swin_tiny_prepbn', 'slab_pvt_tiny', 'slab_cswin_tiny'])
def test_tokens_before_pooling(name):
    recorded = probe.load(name)
    case = golden.case(recorded, 'tokens_224')
    model = golden.build(name)
    tokens = model.forward_features(probe.image(case['seed'], case['shape']))
    tokens = tokens.flatten(2).transpose(1, 2)
    probe.compare(tokens, case['outputs']['tokens'])


@torch.no_grad()
@pytest.mark.parametrize(('queries', 'keys'), [(3, 3), (5, 40), (40, 5), (40, 40)])
def test_linear_attention_is_what_it_says(queries, keys):
    query, key, value = (torch.randn(2, n, 8, dtype=torch.float64) for n in (queries, keys, keys))
    out = torch.zeros(2, queries, 8, dtype=torch.float64)
    for head in range(2):
        q, k, v = (t[..., 4 * head : 4 * head + 4] for t in (query, key, value))
        products = q.relu() @ k.relu().transpose(1, 2)
        out[..., 4 * head : 4 * head + 4] = products @ v / (products.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(linear_attention(query, key, value, 2), out)


@torch.no_grad()
def test_heads_share_the_filters_of_the_convolution():
    conv, x = HeadwiseConv(4, 5), torch.randn(2, 6, 7, 12)
    alone = [conv(part) for part in x.split(4, -1)]
    torch.testing.assert_close(conv(x), torch.cat(alone, -1))
    expected = F.conv2d(x[..., :4].permute(0, 3, 1, 2), conv.weight, conv.bias, padding=2, groups=4)
    torch.testing.assert_close(alone[0], expected.permute(0, 2, 3, 1))


@torch.no_grad()
def test_windows_see_no_further_and_padding_is_the_bias():
    mixer = SimplifiedLinearAttention(dim=8, num_heads=2, window_size=4, shift=2)
    mixer.positional_encoding.normal_()
    x = torch.randn(1, 8, 6, 8)
    padded = F.pad(x, (0, 0, 0, 2)).roll((-2, -2), (1, 2))
    for row in (0, 4):
        for column in (0, 4):
            window = padded[:, row : row + 4, column : column + 4]
            padded[:, row : row + 4, column : column + 4] = mixer.attend(mixer.qkv(window))
    torch.testing.assert_close(mixer(x), mixer.proj(padded.roll((2, 2), (1, 2))[:, :, :6]))
    mixer.always_shift = False
    mixer.shift, unshifted = 0, mixer(x[:, :4])
    mixer.shift = 2
    torch.testing.assert_close(mixer(x[:, :4]), mixer(x[:, :4]) * 0 + unshifted)


def test_encodings_are_resampled():
    table = torch.randn(1, 12, 5)
    assert resampled(table, (3, 4), 3, 4) is table
    wide = resampled(table, (3, 4), 6, 4).unflatten(1, (6, 4))
    torch.testing.assert_close(
        wide[:, 1], 0.75 * table.unflatten(1, (3, 4))[:, 0] + 0.25 * table.unflatten(1, (3, 4))[:, 1]
    )


@torch.no_grad()
def test_values_are_stretched_in_row_order():
    mixer = ReducedLinearAttention(dim=8, num_heads=2, sr_ratio=2, grid=(4, 4))
    x = torch.randn(1, 4, 4, 8)
    small = mixer.norm(mixer.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    key, value = mixer.kv(small).flatten(1, 2).chunk(2, -1)
    out = linear_attention(mixer.q(x).flatten(1, 2), key + mixer.positional_encoding, value, 2)
    long = F.interpolate(value.transpose(1, 2), 16, mode='linear').transpose(1, 2)
    torch.testing.assert_close(mixer(x), mixer.proj(out.view(1, 4, 4, 8) + mixer.dwc(long.reshape(1, 4, 4, 8))))
    assert mixer(torch.randn(1, 5, 3, 8)).shape == (1, 5, 3, 8)


@torch.no_grad()
@pytest.mark.parametrize('name', ['sla', 'reduced_sla', 'linear_stripe'])
def test_mixers_in_another_family(name):
    mixers = (name, 'pool', name, 'attention')
    model = create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), mixers=mixers).eval()
    assert model(torch.randn(1, 3, 64, 96)).isfinite().all()
    for map_size in ((1, 1), (3, 5), (14, 14)):
        x = torch.randn(2, *map_size, 32)
        assert build_mixer(name, dim=32)(x).shape == x.shape
    assert build_mixer(dict(name='linear_stripe', split_size=2), dim=32)(torch.randn(1, 5, 7, 32)).shape == (
        1,
        5,
        7,
        32,
    )


def test_either_form_of_the_norms_loads():
    """Files with RepBN alone load into the dense form, in which LayerNorms start anew."""
    small = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_heads=(1, 1, 1, 1), window_size=2, num_classes=3)
    classifier = create_model('swin_tiny_prepbn', **small)
    dense = create_model('swin_tiny_prepbn', features_only=True, **small)
    load_checkpoint(dense, classifier.state_dict())
    assert {type(m) for m in classifier.modules() if isinstance(m, RepBN)} == {RepBN}
    assert {type(m) for m in dense.modules() if isinstance(m, RepBN)} == {PRepBN}
    theirs = {
        key.replace('.alpha', '.norm2.alpha').replace('.bn.', '.norm2.bn.'): value
        for key, value in dense.state_dict().items()
    }
    theirs = {key.replace('.layer_norm.', '.norm1.'): value for key, value in theirs.items()}
    assert flatten_prepbn(theirs).keys() == dense.state_dict().keys()


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r'num_heads must divide .* got num_heads=3, dim=8'):
        SimplifiedLinearAttention(dim=8, num_heads=3)
    with pytest.raises(ValueError, match=r'shift must be from 0 to window_size - 1, got shift=4, window_size=4'):
        SimplifiedLinearAttention(dim=8, window_size=4, shift=4)
    with pytest.raises(ValueError, match=r'kernel must be a positive odd number, got kernel=4'):
        SimplifiedLinearAttention(dim=8, kernel=4)
    with pytest.raises(ValueError, match=r'sr_ratio must be positive and kernel odd, got sr_ratio=0'):
        ReducedLinearAttention(dim=8, sr_ratio=0)


def fused(model):
    """The deployed form, after which no norm is left but those of the dense form's maps."""
    result = fuse_for_deploy(model)
    left = [name for name, module in result.named_modules() if isinstance(module, RepBN | Affine)]
    assert all(name.startswith('output_norms.') for name in left)
    return result


SMALL = {'depths': (1, 2, 1, 1), 'dims': (16, 16, 32, 32), 'num_heads': (2, 2, 2, 2), 'num_classes': 5}
DEPLOYED = {
    'swin_tiny_prepbn': {'window_size': 4},
    'slab_swin_tiny': {'window_size': 4},
    'slab_pvt_tiny': {},
    'slab_cswin_tiny': {},
}


@torch.no_grad()
@pytest.mark.parametrize('name', DEPLOYED)
@pytest.mark.parametrize('features_only', [False, True])
def test_merging_for_deployment_changes_nothing(name, features_only):
    """At sizes that windows do not divide too: padding keeps what it held before."""
    torch.manual_seed(0)
    model = create_model(name, features_only=features_only, **{**SMALL, **DEPLOYED[name]}).eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim <= 1:
            value.copy_(torch.rand_like(value) * 0.3 + (0.2 if 'weight' in key or 'var' in key else 0))
        elif 'positional' in key:
            value.normal_()
    x = torch.randn(2, 3, 72, 100)
    merged = fused(model)
    ours, expected = (m(x) if features_only else [m(x)] for m in (merged, model))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


@torch.no_grad()
def test_merged_model_of_the_authors():
    """Its own weights in the deployed form's layout."""
    model, recorded = fused(create_model('swin_tiny_prepbn')), probe.load('swin_tiny_prepbn__merged')
    assert sum(p.numel() for p in model.parameters()) == recorded['params']
    state = model.convert(probe.golden_state(recorded))
    load_checkpoint(model, {**state, **{key: v for key, v in model.state_dict().items() if key.endswith('.outside')}})
    golden.run(model, recorded, recorded['cases'][0])


@torch.no_grad()
def test_merging_against_the_authors():
    """Equal weights wherever theirs are not pushed through the last stage; equal logits once their mistake is made: the
    merged convolution of the stem lacks the product of alpha and its old bias."""
    recorded = probe.load('swin_tiny_prepbn')
    case = golden.case(recorded, 'merged_logits_224')
    model = load_checkpoint(create_model('swin_tiny_prepbn'), probe.golden_state(recorded))
    merged, stem = fused(model), model.downsample_layers[0]
    x = probe.image(case['seed'], case['shape'])
    probe.compare(merged(x), golden.case(recorded, 'logits_224')['outputs']['logits'])
    merged.downsample_layers[0].conv.bias -= stem.post_norm.alpha * stem.conv.bias
    ours_of = {theirs: ours for ours, theirs in merged.convert({key: key for key in recorded['state_dict']}).items()}
    state, compared = merged.state_dict(), 0
    for key, stored in case['outputs'].items():
        theirs = key.removeprefix('merged:')
        if key == 'logits':
            probe.compare(merged(x), stored)
        elif not theirs.startswith(('layers.3.', 'layers.2.downsample.')):  # ours: the last norm is in the classifier
            ours = ours_of.get(theirs, 'downsample_layers.1.reduction.bias')  # new in the merged model
            probe.compare(state[ours], stored)
            compared += 1
    assert compared == 7
