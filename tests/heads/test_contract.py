"""Without this a head might work for its quickstart alone: each must take any pyramid by its channels and strides, give
the same for a picture alone or in a batch, survive empty targets, export, and keep results inside each picture."""

import pytest
import torch
from torch.export import Dim, export

from densezoo.heads import (
    ATSS,
    DETR,
    FCOS,
    FPN,
    GFL,
    RTDETR,
    CascadeRCNN,
    DeformableDETR,
    HybridEncoder,
    LinearClassifier,
    MaskRCNN,
    PyramidInfo,
    RetinaNet,
    SemanticFPN,
    UNetRestorer,
)

# id, strides, channels of the maps that enter (ugly ones first)
PYRAMIDS = [
    pytest.param([3, 7, 21], [16, 16, 16], id='odd_strides'),
    pytest.param([16], [24], id='one_map'),
    pytest.param([8, 32], [16, 16], id='gap'),
    pytest.param([4, 8, 16, 32, 64], [16] * 5, id='five'),
]
SMALL_RCNN = {
    'rpn_pre_nms': (60, 60),
    'rpn_post_nms': (30, 30),
    'box_channels': 16,
    'mask_channels': 8,
    'mask_convs': 1,
    'roi_batch': 32,
    'rpn_batch': 32,
    'score_threshold': 0.0,
    'detections': 20,
}
SMALL_SET = {'channels': 16, 'num_heads': 2, 'hidden': 16, 'decoder_layers': 2, 'num_queries': 20, 'dropout': 0.0}
DETECTORS = {
    'retinanet': lambda info, **kw: RetinaNet(
        feature_info=info, num_classes=5, num_convs=1, **{'score_threshold': 0.0, **kw}
    ),
    'retinanet_giou': lambda info, **kw: RetinaNet(
        feature_info=info,
        num_classes=5,
        num_convs=2,
        channels=8,
        norm='group',
        box_loss='giou',
        anchor_offset=0.5,
        exact_strides=True,
        exact_sizes=True,
        low_quality='box',
        average='batch',
        score_threshold=0.0,
        **kw,
    ),
    'fcos': lambda info, **kw: FCOS(feature_info=info, num_classes=5, num_convs=1, **{'score_threshold': 0.0, **kw}),
    'fcos_inside': lambda info, **kw: FCOS(
        feature_info=info,
        num_classes=5,
        channels=8,
        norm='none',
        center_radius=None,
        box_loss='diou',
        distance='exp',
        centerness='classes',
        point_offset=0.5,
        exact_strides=True,
        scales=True,
        weigh_boxes=True,
        product=True,
        score_threshold=0.0,
        **kw,
    ),
    'atss': lambda info, **kw: ATSS(feature_info=info, num_classes=5, num_convs=1, **{'score_threshold': 0.0, **kw}),
    'gfl': lambda info, **kw: GFL(
        feature_info=info, num_classes=5, num_convs=1, channels=8, **{'score_threshold': 0.0, **kw}
    ),
    'detr': lambda info, **kw: DETR(feature_info=info, num_classes=5, encoder_layers=1, **{**SMALL_SET, **kw}),
    'deformable_detr': lambda info, **kw: DeformableDETR(
        feature_info=info, num_classes=5, num_levels=len(info) + 1, encoder_layers=1, **{**SMALL_SET, **kw}
    ),
    'deformable_detr_two_stages': lambda info, **kw: DeformableDETR(
        feature_info=info,
        num_classes=5,
        num_levels=len(info),
        encoder_layers=1,
        refine=True,
        two_stages=True,
        **{**SMALL_SET, **kw},
    ),
    'rtdetr': lambda info, **kw: RTDETR(
        feature_info=info, num_classes=5, eval_layers=1, **{**SMALL_SET, 'num_denoising': 10, **kw}
    ),
    'mask_rcnn': lambda info, **kw: MaskRCNN(feature_info=info, num_classes=5, **{**SMALL_RCNN, **kw}),
    'cascade_mask_rcnn': lambda info, **kw: CascadeRCNN(feature_info=info, num_classes=5, **{**SMALL_RCNN, **kw}),
    'faster_rcnn': lambda info, **kw: MaskRCNN(feature_info=info, num_classes=5, masks=False, **{**SMALL_RCNN, **kw}),
}
INFO = PyramidInfo([16, 16, 16], [8, 16, 32])
SIZE = (96, 128)


def maps(info, size=SIZE, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s), generator=generator)
        for c, s in zip(info.channels(), info.reduction())
    ]


def target(*boxes, size=SIZE):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist()):
        mask[y0:y1, x0:x1] = True
    return {'boxes': boxes, 'labels': torch.arange(len(boxes)) % 5, 'masks': masks, 'size': size}


TARGETS = [target([4, 6, 40, 50], [50, 20, 110, 80], [60, 30, 84, 52]), target(), target([10, 40, 90, 90])]


def build(name, info=INFO, **options):
    torch.manual_seed(0)
    head = DETECTORS[name](info, **options)
    with torch.no_grad():  # the published initialisation is nearly constant; spread the outputs
        for p in head.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return head


def backward(head, losses):
    head.zero_grad()
    sum(value for key, value in losses.items() if key.startswith('loss_')).backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None, f'{key} got no gradient: DDP would wait for it'
        assert torch.isfinite(parameter.grad).all(), key
    return {key: value.item() for key, value in losses.items()}


@pytest.mark.parametrize('name', DETECTORS)
def test_empty_and_degenerate_targets(name):
    head = build(name)
    flat = target([10, 10, 10, 40], [20, 30, 50, 30])
    for targets in (TARGETS, [target(), target(), target()], [flat, target(), flat]):
        torch.manual_seed(0)
        losses = backward(head, head.loss(maps(INFO), targets))
        assert all(key.startswith('loss_') for key in losses)
        assert all(torch.isfinite(torch.tensor(value)) and value >= 0 for value in losses.values()), losses
        box_terms = [losses[key] for key in losses if key in ('loss_box', 'loss_rpn_box_reg')]
        assert (max(box_terms) > 0) == (targets is TARGETS)


@pytest.mark.parametrize('name', DETECTORS)
def test_order_of_targets_does_not_matter(name):
    drawn = {'rcnn': {'rpn_batch': 10**6, 'roi_batch': 10**6}, 'rtdetr': {'num_denoising': 0}}
    head = build(name, **next((options for key, options in drawn.items() if key in name), {}))
    order = torch.tensor([2, 0, 1])
    turned = [{k: (v[order] if k != 'size' and len(v) == 3 else v) for k, v in t.items()} for t in TARGETS]
    assert not torch.equal(turned[0]['boxes'], TARGETS[0]['boxes'])
    one, other = head.loss(maps(INFO), TARGETS), head.loss(maps(INFO), turned)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', DETECTORS)
def test_batch_equals_singles(name):
    head, features = build(name).eval(), maps(INFO)
    if not hasattr(head, 'roi_heads'):  # rounding must not decide which of two nearly equal scores comes first
        head, features = head.double(), [f.double() for f in features]
    sizes, originals = [(96, 128), (80, 100), (33, 61)], [(192, 128), (80, 100), (77, 200)]
    with torch.no_grad():
        together = head.predict(features, sizes, originals)
        for i, result in enumerate(together):
            alone = head.predict([f[i : i + 1] for f in features], sizes[i : i + 1], originals[i : i + 1])[0]
            assert len(result['scores']) > 0
            assert result.keys() == alone.keys()
            for key, value in result.items():
                torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', DETECTORS)
def test_results_stay_inside_and_scale_exactly(name):
    head, features = build(name).eval(), maps(INFO)
    sizes, originals = [(96, 128), (40, 128), (17, 23)], [(192, 256), (20, 64), (51, 115)]
    with torch.no_grad():
        plain = head.predict(features, sizes)
        scaled = head.predict(features, sizes, originals)
    for result, larger, (h, w), (height, width) in zip(plain, scaled, sizes, originals):
        assert len(result['boxes']) > 0 and result['labels'].dtype == torch.int64
        assert set(result['labels'].tolist()) <= set(range(5)) and torch.isfinite(result['boxes']).all()
        assert ((result['scores'] >= 0) & (result['scores'] <= 1)).all()
        assert (result['scores'].diff() <= 1e-6).all()
        x, y = result['boxes'][:, 0::2], result['boxes'][:, 1::2]
        assert x.min() >= 0 and x.max() <= w and y.min() >= 0 and y.max() <= h
        assert (x[:, 1] > x[:, 0]).all() and (y[:, 1] > y[:, 0]).all()
        ratio = torch.tensor([width / w, height / h] * 2)
        torch.testing.assert_close(larger['boxes'], result['boxes'] * ratio)
        if 'masks' in result:
            assert result['masks'].shape == (len(x), h, w) and result['masks'].dtype == torch.bool
            assert larger['masks'].shape == (len(x), height, width)


@pytest.mark.parametrize(('strides', 'channels'), PYRAMIDS)
@pytest.mark.parametrize('name', DETECTORS)
def test_any_pyramid(name, strides, channels):
    info = PyramidInfo(channels, strides)
    head = build(name, info)
    losses = backward(
        head, head.loss(maps(info, (101, 133)), [target([4, 6, 40, 50]), target(), target([9, 9, 90, 90])])
    )
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    with torch.no_grad():
        results = head.eval().predict(maps(info, (101, 133)), [(101, 133), (90, 20), (50, 133)])
    assert len(results) == 3 and results[0]['boxes'].shape[1] == 4


EXPORTED = ['retinanet', 'fcos', 'gfl', 'mask_rcnn', 'rtdetr']
EXPORTED_SLOWLY = ['atss', 'cascade_mask_rcnn', 'detr', 'deformable_detr', 'deformable_detr_two_stages']


@pytest.mark.slow
@pytest.mark.parametrize('name', EXPORTED_SLOWLY)
def test_the_other_detectors_export(name):
    test_exported_equals_eager(build(name), maps(INFO))


def heads_for_export():
    torch.manual_seed(0)
    wide = PyramidInfo([8, 12, 20], [4, 8, 16])
    yield from ((name, build(name), maps(INFO)) for name in EXPORTED)
    yield 'fpn', FPN(feature_info=wide, out_channels=16, extra='p6p7'), maps(wide)
    yield 'hybrid_encoder', HybridEncoder(feature_info=wide, out_channels=16, hidden=16, depth=1), maps(wide)
    yield 'semantic_fpn', SemanticFPN(feature_info=wide, num_classes=5, channels=8), maps(wide)
    yield 'linear', LinearClassifier(feature_info=wide, num_classes=5), maps(wide)


@pytest.mark.parametrize(('head', 'features'), [pytest.param(h, f, id=name) for name, h, f in heads_for_export()])
def test_exported_equals_eager(head, features):
    batch = Dim('batch', min=2, max=16)
    program = export(head.eval(), (features,), dynamic_shapes=([{0: batch} for _ in features],)).module()
    other = [torch.cat([f, f]) for f in features]
    with torch.no_grad():
        expected, got = head(other), program(other)
    for ours, exported in zip(*(x if isinstance(x, list | tuple) else [x] for x in (expected, got)), strict=True):
        torch.testing.assert_close(exported, ours, rtol=1e-5, atol=1e-5)


def test_restorer_exports_with_dynamic_size():
    info = PyramidInfo([8, 12], [4, 8])
    head = UNetRestorer(feature_info=info, channels=4)
    torch.nn.init.normal_(head.last.weight)
    images = torch.rand(1, 3, 32, 48)
    h, w = Dim('h', min=2, max=64), Dim('w', min=2, max=64)
    program = export(
        head,
        (maps(info, (32, 48), 1), images),
        dynamic_shapes=([{2: 2 * h, 3: 2 * w}, {2: h, 3: w}], {2: 8 * h, 3: 8 * w}),
    ).module()
    other = maps(info, (40, 72), 1), torch.rand(1, 3, 40, 72)
    torch.testing.assert_close(program(*other), head(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['retinanet', 'fcos', 'mask_rcnn', 'deformable_detr_two_stages', 'rtdetr'])
def test_evaluation_before_training_and_bfloat16(name):
    """The kept anchors must not be inference tensors; losses are float32 under autocast."""
    head = build(name, box_loss='giou') if name in ('retinanet', 'fcos') else build(name)
    with torch.inference_mode():
        head.eval().predict(maps(INFO), [SIZE] * 3)
    with torch.autocast('cpu', torch.bfloat16):
        losses = head.train().loss(maps(INFO), TARGETS)
        assert {value.dtype for value in losses.values()} == {torch.float32}
    backward(head, losses)


BAD = [
    (
        'labels',
        {'labels': torch.tensor([5]), 'boxes': torch.ones(1, 4)},
        r'labels must be in 0\.\.4 .*got 5; is num_classes=5',
    ),
    ('negative', {'labels': torch.tensor([-1]), 'boxes': torch.ones(1, 4)}, r'labels must be in 0\.\.4 .*got -1'),
    ('boxes', {'labels': torch.tensor([1]), 'boxes': torch.ones(4)}, r'targets\[0\] needs boxes \(N, 4\)'),
]


@pytest.mark.parametrize(('wrong', 'message'), [pytest.param(t, m, id=i) for i, t, m in BAD])
@pytest.mark.parametrize('name', ['retinanet', 'fcos', 'detr'])
def test_bad_targets(name, wrong, message):
    with pytest.raises(ValueError, match=message):
        build(name).loss(maps(INFO), [wrong, *TARGETS[1:]])


WIDE = PyramidInfo([8, 16], [8, 16])
ERRORS = [
    (
        lambda: RetinaNet(feature_info=WIDE, num_classes=3),
        r'RetinaNet needs maps of one width, got channels=\[8, 16\]; put an FPN',
    ),
    (lambda: FCOS(feature_info=INFO, num_classes=0), 'num_classes must be at least 1, got 0'),
    (
        lambda: FCOS(feature_info=INFO, num_classes=3, box_loss='gious'),
        "box_loss must be one of .* did you mean 'giou'",
    ),
    (
        lambda: FCOS(feature_info=INFO, num_classes=3, size_ranges=[(0, 9)]),
        r'size_ranges needs one 0 <= low < high per level \(3\)',
    ),
    (lambda: FCOS(feature_info=INFO, num_classes=3, center_radius=0), 'center_radius must be positive or None, got 0'),
    (
        lambda: FCOS(feature_info=INFO, num_classes=3, distance='expo'),
        r"distance must be one of \('relu', 'exp'\), got 'expo'; did you mean 'exp'",
    ),
    (
        lambda: FCOS(feature_info=INFO, num_classes=3, centerness='box'),
        r"centerness must be one of \('boxes', 'classes'\), got 'box'; did you mean 'boxes'",
    ),
    (
        lambda: RetinaNet(feature_info=INFO, num_classes=3, low_quality='boxes'),
        r"low_quality must be one of \('best', 'box'\), got 'boxes'; did you mean 'box'",
    ),
    (
        lambda: RetinaNet(feature_info=INFO, num_classes=3, average='batches'),
        r"average must be one of \('picture', 'batch'\), got 'batches'; did you mean 'batch'",
    ),
    (
        lambda: RetinaNet(feature_info=INFO, num_classes=3, score_threshold=5),
        r'score_threshold must be in \[0, 1\], got 5',
    ),
    (
        lambda: RetinaNet(feature_info=INFO, num_classes=3, background_iou=0.6),
        'background_iou must not exceed foreground_iou=0.5',
    ),
    (
        lambda: RetinaNet(feature_info=INFO, num_classes=3, anchor_sizes=[(8,)]),
        'anchor_sizes needs as many sizes on each of the 3 levels',
    ),
    (lambda: RetinaNet(feature_info=INFO, num_classes=3, anchor_offset=1.5), r'anchor_offset must be in \[0, 1\)'),
    (
        lambda: RetinaNet(feature_info=INFO, num_classes=3, norm='groups'),
        "norm must be one of .* did you mean 'group'",
    ),
    (lambda: RetinaNet(feature_info=INFO, num_classes=3, num_convs=0, channels=8), 'num_convs=0 needs channels equal'),
    (
        lambda: MaskRCNN(feature_info=INFO, num_classes=3, roi_levels=[7]),
        r'roi_levels must be indices of the 3 maps, got \(7,\)',
    ),
    (
        lambda: build('mask_rcnn').loss(maps(INFO), [{'boxes': torch.ones(1, 4), 'labels': torch.ones(1)}] * 3),
        r'has no masks; ask the dataset',
    ),
    (lambda: build('fcos').predict(maps(INFO), [SIZE]), 'one .* per picture, got 1 and None for a batch of 3'),
    (
        lambda: build('fcos').predict(maps(INFO), [SIZE, SIZE, (97, 128)]),
        r'sizes\[2\] must lie inside the padded batch \(96, 128\), got',
    ),
    (
        lambda: build('fcos')(maps(WIDE)),
        r'features must be a list of maps with channels \[16, 16, 16\], got \[8, 16\]',
    ),
    (lambda: FPN(feature_info=WIDE, extra='p6'), "extra must be one of .* did you mean 'p6p7'"),
    (lambda: FPN(feature_info=[8, 16]), r'feature_info must have channels\(\) and reduction\(\), .* got list'),
    (lambda: PyramidInfo([8, 8], [8, 4]), r'rising strides .* got reduction=\[8, 4\]'),
    (lambda: PyramidInfo([8], [8, 16]), 'one stride per map'),
]


@pytest.mark.parametrize(('call', 'message'), [pytest.param(c, m, id=str(i)) for i, (c, m) in enumerate(ERRORS)])
def test_errors_are_one_line(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_misspelt_argument_is_an_error():
    with pytest.raises(TypeError, match='num_clases'):
        FCOS(feature_info=INFO, num_clases=3)
