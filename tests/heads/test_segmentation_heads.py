"""Without this a per-pixel head could drift from MMSegmentation's or NVIDIA's, whose logits, losses and gradients were
recorded, read a pyramid that is not its backbone's, or fail on masks without a known pixel."""

import probe
import pytest
import torch
from torch import nn
from torch.export import Dim, export

from densezoo.heads import FCN, DeepLabV3Plus, PyramidInfo, SegFormerHead, UPerNet, segformer, segmentation

RECORDED = PyramidInfo([64, 128, 320, 512], [4, 8, 16, 32])
SIZE = (256, 320)
# file -> class, options, how the authors' keys become ours
GOLDENS = {
    'uper_head_128': (UPerNet, {'channels': 128}, segmentation.convert),
    'fcn_aux_head': (FCN, {'channels': 256, 'loss_weight': 0.4}, segmentation.convert),
    'segformer_head_256': (SegFormerHead, {'projection': 'conv'}, segformer.convert),
    'segformer_head_nvlabs_256': (SegFormerHead, {}, segformer.convert),
    'segformer_head_nvlabs_768': (SegFormerHead, {'channels': 768}, segformer.convert),
    'deeplabv3plus_head': (DeepLabV3Plus, {'channels': 128}, segmentation.convert),
}
INFO = PyramidInfo([8, 12, 16], [4, 8, 16])
HEADS = {
    'upernet': lambda info=INFO, **kw: UPerNet(feature_info=info, num_classes=4, channels=8, **kw),
    'fcn': lambda info=INFO, **kw: FCN(feature_info=info, num_classes=4, channels=8, level=-1, concat_input=True, **kw),
    'segformer': lambda info=INFO, **kw: SegFormerHead(feature_info=info, num_classes=4, channels=8, **kw),
    'segformer_conv': lambda info=INFO, **kw: SegFormerHead(
        feature_info=info, num_classes=4, channels=8, projection='conv', **kw
    ),
    'deeplabv3plus': lambda info=INFO, **kw: DeepLabV3Plus(
        feature_info=info, num_classes=4, channels=8, low_channels=4, dilations=(1, 2, 12), **kw
    ),
}


def test_checkpoints_with_group_norms_load():
    head = HEADS['upernet'](norm='group')
    theirs = {f'decode_head.{key}'.replace('.bn.', '.gn.'): value for key, value in head.state_dict().items()}
    assert any('.gn.' in key for key in theirs)
    HEADS['upernet'](norm='group').load_state_dict(segmentation.convert(theirs))


def load(name):
    kind, options, convert = GOLDENS[name]
    golden = probe.load(f'heads/{name}')
    head = kind(feature_info=RECORDED, num_classes=19, average='all', **options)
    loaded = head.load_state_dict(convert(probe.golden_state(golden)), strict=False)
    assert not loaded.unexpected_keys and all(key.endswith('num_batches_tracked') for key in loaded.missing_keys)
    unused = 19 * 128 + 19 if 'nvlabs' in name else 0  # a classifier that the authors' base class leaves behind
    assert sum(p.numel() for p in head.parameters()) == golden['params'] - unused
    return head.eval(), {case['name']: case for case in golden['cases']}, golden


def recorded_maps(case):
    return [probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'])]


def maps(info=INFO, size=(50, 66), batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s), generator=generator)
        for c, s in zip(info.channels(), info.reduction())
    ]


def build(name, info=INFO, **options):
    torch.manual_seed(0)
    head = HEADS[name](info, **options)
    nn.init.normal_(head.conv_seg.weight, std=0.3)  # published: 0.01, nearly constant logits
    return head.eval()


# ----------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if '768' in n else n for n in GOLDENS])
@torch.no_grad()
def test_recorded_logits_and_loss(name):
    head, cases, _ = load(name)
    case = cases['head_256x320']
    features = recorded_maps(case)
    probe.compare(head(features), case['outputs']['logits'])
    if 'loss_256x320' not in cases:
        assert 'nvlabs' in name
        return
    n, i, j = torch.meshgrid(torch.arange(2), torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing='ij')
    labels = ((i // 4) * 7 + (j // 8) * 3 + n) % 19
    labels[(i + j) % 17 == 0] = 255
    losses = head.loss(features, [{'mask': mask} for mask in labels])
    recorded = cases['loss_256x320']['outputs']
    assert losses['loss_seg'].item() == pytest.approx(recorded['loss_ce'], rel=1e-4)
    assert losses['pixel_accuracy'].item() * 100 == pytest.approx(recorded['acc_seg'], abs=0.02)


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if '768' in n else n for n in GOLDENS])
def test_recorded_gradients(name):
    head, cases, golden = load(name)
    case = cases['grad']
    features = [x.requires_grad_() for x in recorded_maps(case)]
    head(features).square().mean().backward()
    ours_of = {theirs: ours for ours, theirs in GOLDENS[name][2]({key: key for key in golden['state_dict']}).items()}
    parameters = dict(head.named_parameters())
    assert len(case['outputs']) >= 2
    for key, stored in case['outputs'].items():
        key = key.removeprefix('grad_')
        gradient = features[int(key[5:])].grad if key.startswith('input') else parameters[ours_of[key]].grad
        noise = golden['numerics']['max'] * stored['std'] if golden['numerics']['at'].endswith(key) else 0.0
        probe.compare(gradient, stored, noise=noise, relative=1e-3)


# -------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize('name', HEADS)
def test_batch_equals_singles_and_padding_is_cut(name):
    head, features = build(name), maps()
    with torch.no_grad():
        together = head.predict(features, [(50, 66), (20, 31)], [(100, 132), (10, 31)])
        assert len(together[0]['mask'].unique()) > 1
        for i, (size, original) in enumerate((((50, 66), (100, 132)), ((20, 31), (10, 31)))):
            alone = head.predict([x[i : i + 1] for x in features], [size], [original])[0]['mask']
            assert alone.shape == original and (alone == together[i]['mask']).float().mean() > 0.999


@pytest.mark.parametrize(
    'info', [PyramidInfo([8], [16]), PyramidInfo([8, 8], [8, 32]), PyramidInfo([4] * 5, [3, 7, 14, 28, 56])]
)
@pytest.mark.parametrize('name', HEADS)
def test_any_pyramid_learns(name, info):
    head = build(name, info).train()
    targets = [{'mask': torch.randint(0, 4, (60, 90))} for _ in range(2)]
    terms = head.loss(maps(info, (60, 90)), targets)
    terms['loss_seg'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert sum(float(p.grad.abs().sum()) > 0 for p in head.parameters()) > 3


UNKNOWN = {
    'all unknown': torch.full((50, 66), 255),
    'one class': torch.full((50, 66), 2),
    'one pixel': torch.full((50, 66), 255).index_put((torch.tensor([7]), torch.tensor([9])), torch.tensor(1)),
}


@pytest.mark.parametrize('masks', UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize('name', HEADS)
def test_masks_that_say_little_are_trained_through(name, masks):
    head = build(name, dice_weight=1.0, lovasz_weight=1.0).train()
    terms = head.loss(maps(), [{'mask': masks}, {'mask': masks[:20]}])
    sum(value for key, value in terms.items() if key.startswith('loss_')).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(p.grad.isfinite().all() for p in head.parameters())
    if not (masks != 255).any():
        assert terms['loss_seg'] == 0


@pytest.mark.parametrize(
    'name', [n if n in ('upernet', 'deeplabv3plus') else pytest.param(n, marks=pytest.mark.slow) for n in HEADS]
)
def test_exported_with_any_size_equals_eager(name):
    head = build(name)
    h, w = Dim('h', min=2, max=64), Dim('w', min=2, max=64)
    sizes = [{2: (16 // s) * h, 3: (16 // s) * w} for s in INFO.reduction()]
    program = export(head, (maps(size=(64, 96)),), dynamic_shapes=(sizes,)).module()
    with torch.no_grad():
        for size in ((64, 96), (112, 208)):
            torch.testing.assert_close(program(maps(size=size)), head(maps(size=size)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', HEADS)
def test_bf16_autocast(name):
    head = build(name)
    expected = head(maps())
    with torch.autocast('cpu', torch.bfloat16):
        assert (head(maps()).float() - expected).abs().max() <= 0.06 * expected.abs().max()


def test_loss_weight_is_a_factor_of_every_term():
    features, targets = maps(), [{'mask': torch.randint(0, 4, (50, 66))} for _ in range(2)]
    whole = build('fcn', dice_weight=1.0).loss(features, targets)
    part = build('fcn', dice_weight=1.0, loss_weight=0.4).loss(features, targets)
    for key in ('loss_seg', 'loss_dice'):
        torch.testing.assert_close(part[key], 0.4 * whole[key])
    assert part['pixel_accuracy'] == whole['pixel_accuracy']


class Turned(nn.Module):
    """A mixer that gives every position the mean of its row."""

    def __init__(self, *, dim, gain=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), gain))

    def forward(self, x):
        assert x.is_contiguous() and x.shape[-1] == len(self.scale)
        return x.mean(2, keepdim=True).expand_as(x) * self.scale


@pytest.mark.parametrize('spec', [Turned, {'type': Turned, 'gain': 2.0}, {'type': 'unittest.mock.Mock'}])
def test_a_mixer_takes_the_place_of_the_last_convolution(spec):
    head = UPerNet(
        feature_info=INFO, num_classes=4, channels=8, norm='group', mixer=spec if spec is Turned else {**spec}
    )
    if isinstance(spec, dict) and isinstance(spec['type'], str):  # what a dumped config holds is looked up by name
        assert type(head.fpn_bottleneck[1].mixer).__name__ == 'Mock'
        return
    mixed = head.eval().fpn_bottleneck(torch.randn(1, 24, 5, 7))
    torch.testing.assert_close(mixed, mixed[..., :1].expand_as(mixed))
    assert 'fpn_bottleneck.1.mixer.scale' in dict(head.named_parameters())


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: build('upernet', pool_scales=()), r'pool_scales must be one or more positive .* got \(\)'),
        (lambda: build('deeplabv3plus', norm='bach'), "did you mean 'batch'"),
        (
            lambda: DeepLabV3Plus(feature_info=INFO, num_classes=4, dilations=(1, 0)),
            r'dilations must be one or more positive numbers, got \(1, 0\)',
        ),
        (
            lambda: SegFormerHead(feature_info=INFO, num_classes=4, projection='lineal'),
            "projection must be one of .* did you mean 'linear'",
        ),
        (lambda: FCN(feature_info=INFO, num_classes=4, level=3), 'level must be an index of the 3 maps, got 3'),
        (
            lambda: FCN(feature_info=INFO, num_classes=4, num_convs=0, channels=8),
            'num_convs=0 needs channels equal to those of the map, got 8 and 12',
        ),
        (
            lambda: build('upernet').train()(maps(batch=1)),
            "pool scale 1 leaves one value .* batches of two or more, or norm='group'",
        ),
        (lambda: build('deeplabv3plus').train()(maps(batch=1)), "one value per channel, .* or norm='group'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_a_mixer_must_be_a_factory():
    with pytest.raises(TypeError, match=r'mixer must be a callable or dict\(type=callable, ...\), .* got \'gnconv\''):
        UPerNet(feature_info=INFO, num_classes=4, channels=8, mixer='gnconv')


def test_single_pictures_train_with_group_norm():
    for name in ('upernet', 'deeplabv3plus'):
        head = build(name, norm='group').train()
        head.loss(maps(batch=1), [{'mask': torch.randint(0, 4, (50, 66))}])['loss_seg'].backward()
        assert all(p.grad is not None for p in head.parameters())
