"""Without this EfficientViT's segmentation head could drift from the authors' segmentor, whose outputs and gradients
were recorded with its backbone, or fail at sizes that 32 does not divide."""

import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.heads import EfficientViTSeg, PyramidInfo
from densezoo.heads.efficientvit_seg import convert

INFO = PyramidInfo([8, 12, 16], [8, 16, 32])


def maps(size=(100, 132), batch=2):
    torch.manual_seed(1)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(INFO.channels(), INFO.reduction())
    ]


def build(**options):
    torch.manual_seed(0)
    return EfficientViTSeg(feature_info=INFO, num_classes=4, channels=8, **options).eval()


@pytest.fixture(scope='module')
def segmentor():
    golden = probe.load('heads/efficientvit_seg_b0_cityscapes')
    state = probe.golden_state(golden)
    backbone = create_model('efficientvit_cls_b0', features_only=True, out_indices=(1, 2, 3))
    head = EfficientViTSeg(feature_info=backbone.feature_info, num_classes=19)
    load_checkpoint(backbone, state)
    loaded = head.load_state_dict(convert(state), strict=False)
    assert not loaded.unexpected_keys and all(key.endswith('num_batches_tracked') for key in loaded.missing_keys)
    assert sum(p.numel() for part in (backbone, head) for p in part.parameters()) == golden['params']
    return backbone.eval(), head.eval(), {case['name']: case for case in golden['cases']}


@pytest.mark.parametrize('name', ['seglogits_128x192', 'seglogits_256x320'])
@torch.no_grad()
def test_logits(segmentor, name):
    backbone, head, cases = segmentor
    case = cases[name]
    probe.compare(head(backbone(probe.image(case['seed'], case['shape']))), case['outputs']['seglogits'])


def test_gradients(segmentor):
    backbone, head, cases = segmentor
    case = cases['grad_128x192']
    x = probe.image(case['seed'], case['shape']).requires_grad_()
    loss = head(backbone(x)).square().mean()
    loss.backward()
    recorded = case['outputs']
    assert recorded.keys() == {
        'loss',
        'grad_input',
        'grad_backbone.input_stem.op_list.0.conv.weight',
        'grad_head.middle.op_list.0.main.depth_conv.conv.weight',
    }
    stored = recorded['loss']
    assert loss.item() == pytest.approx(stored['values'][0] if isinstance(stored, dict) else stored, rel=1e-4)
    for gradient, key in (
        (x.grad, 'grad_input'),
        (
            backbone.downsample_layers[0].conv.conv.weight.grad,
            'grad_backbone.input_stem.op_list.0.conv.weight',
        ),
        (
            head.middle[0].main['depth_conv'].conv.weight.grad,
            'grad_head.middle.op_list.0.main.depth_conv.conv.weight',
        ),
    ):
        probe.compare(gradient, recorded[key], relative=1e-3)


@pytest.mark.parametrize('options', [{'block': 'fused', 'act': 'gelu', 'final_ratio': None, 'depth': 3}, {}])
def test_any_size_learns_and_predicts(options):
    head = build(**options)
    assert head(maps()).shape == (2, 4, 13, 17)
    targets = [{'mask': torch.randint(0, 4, (100, 132))} for _ in range(2)]
    terms = head.train().loss(maps(), targets)
    terms['loss_seg'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    results = head.eval().predict(maps(), [(100, 132), (50, 60)], [(200, 264), (50, 60)])
    assert [tuple(r['mask'].shape) for r in results] == [(200, 264), (50, 60)]


def test_head_without_final_layer_has_the_authors_names():
    """Theirs counts the classifier as layer 0 then."""
    head = build(block='fused', final_ratio=None)
    theirs = {f'head.output_ops.0.op_list.0.conv.{end}': torch.zeros(1) for end in ('weight', 'bias')}
    assert convert(theirs).keys() == {'classifier.weight', 'classifier.bias'} <= head.state_dict().keys()


@torch.no_grad()
def test_bf16_autocast_and_export():
    head = build()
    expected = head(maps())
    with torch.autocast('cpu', torch.bfloat16):
        assert (head(maps()).float() - expected).abs().max() <= 0.05 * expected.abs().max()
    program = torch.export.export(head, (maps(),)).module()
    torch.testing.assert_close(program(maps()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'block': 'mbconv'}, r"block must be one of \('mb', 'fused'\), got 'mbconv'"),
        ({'act': 'swish'}, "act must be one of .*did you mean 'hswish'"),
        ({'ignore_index': 3}, r'ignore_index must not be a class id \(0\.\.3\), got 3'),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
