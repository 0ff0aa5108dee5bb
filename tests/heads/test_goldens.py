"""Without this a head could drift from the published one: outputs, losses, gradients, detections are compared with what
torchvision's, MMSegmentation's and MMDetection's own code gave for the same deterministic weights and maps."""

from functools import partial

import probe
import pytest
import torch

from densezoo.heads import (
    ATSS,
    FCOS,
    FPN,
    GFL,
    MaskRCNN,
    PyramidInfo,
    RetinaNet,
    SemanticFPN,
    atss,
    fcos,
    fpn,
    retinanet,
)

FPN_INPUTS = PyramidInfo([64, 128, 320, 512], [4, 8, 16, 32])
SIZE = (256, 320)


def load(name):
    golden = probe.load(f'heads/{name}')
    return golden, {case['name']: case for case in golden['cases']}


def maps(case):
    return [probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'])]


def targets_of(case):
    """The recorded targets; labels there are numbers of logits already. Masks are ellipses inscribed in the boxes."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5, indexing='ij')
    targets = []
    for target in case['targets']:
        boxes = torch.tensor(target['boxes'])
        centre, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        masks = torch.stack([((x - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 <= 1 for c, r in zip(centre, radius)])
        targets.append({'boxes': boxes, 'labels': torch.tensor(target['labels']), 'masks': masks})
    return targets


def compare_detections(results, recorded):
    for ours, theirs in zip(results, recorded, strict=True):
        count = len(theirs['scores'])
        assert len(ours['scores']) == theirs['count'] and count >= 50
        torch.testing.assert_close(ours['labels'][:count], torch.tensor(theirs['labels']))
        torch.testing.assert_close(ours['scores'][:count], torch.tensor(theirs['scores']), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours['boxes'][:count], torch.tensor(theirs['boxes']), rtol=1e-4, atol=2e-2)


def compare_losses(head, case, targets, names, prefix=''):
    """`names`: our terms for the recorded ones. Gradients of the summed loss are compared wherever one is recorded."""
    head.zero_grad()
    losses = head.loss(maps(case), targets)
    sum(losses[name] for name in names).backward()
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(case['outputs'][theirs], rel=1e-4)
    gradients = {key[5:]: value for key, value in case['outputs'].items() if key.startswith('grad_')}
    assert len(gradients) == 3
    parameters = dict(head.named_parameters())
    for key, stored in gradients.items():
        probe.compare(parameters[key].grad, stored, relative=1e-3)


# FPN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('extra', ['maxpool', 'p6p7'])
def test_torchvision_fpn(extra):
    golden, cases = load(f'tv_fpn_{extra}')
    neck = FPN(feature_info=FPN_INPUTS, extra=extra)
    neck.load_state_dict(probe.golden_state(golden))
    assert sum(p.numel() for p in neck.parameters()) == golden['params']
    for case in cases.values():
        for ours, stored in zip(neck(maps(case)), case['outputs'].values(), strict=True):
            probe.compare(ours, stored)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('maxpool', {'extra': 'maxpool'}),
        ('p6p7_on_input', {'extra': 'p6p7', 'extra_source': 'input', 'extra_relu': False}),
        ('p6p7_on_input_relu', {'extra': 'p6p7', 'extra_source': 'input'}),
        ('p6p7_on_output', {'extra': 'p6p7', 'extra_relu': False}),
    ],
)
def test_mmdetection_fpn(name, options):
    golden, cases = load(f'mmdet_fpn_{name}')
    start = golden['config'].get('start_level', 0)
    info = PyramidInfo(FPN_INPUTS.channels()[start:], FPN_INPUTS.reduction()[start:])
    neck = FPN(feature_info=info, **options)
    neck.load_state_dict(fpn.convert(probe.golden_state(golden), levels=len(info)))
    compared = 0
    for case in cases.values():
        if 'grad' in case['name']:
            continue
        for ours, stored in zip(neck(maps(case)[start:]), case['outputs'].values(), strict=True):
            probe.compare(ours, stored)
            compared += 1
    assert compared >= 5


# Semantic FPN ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def semantic():
    golden, cases = load('semantic_fpn')
    state = probe.golden_state(golden)
    neck = FPN(feature_info=FPN_INPUTS)
    neck.load_state_dict(fpn.convert({k: v for k, v in state.items() if k.startswith('neck.')}, levels=4))
    head = SemanticFPN(feature_info=neck.feature_info, num_classes=19, average='all')
    loaded = head.load_state_dict(
        {k.removeprefix('decode_head.'): v for k, v in state.items() if k.startswith('decode_head.')}, strict=False
    )
    assert not loaded.unexpected_keys and all(k.endswith('num_batches_tracked') for k in loaded.missing_keys)
    assert sum(p.numel() for part in (neck, head) for p in part.parameters()) == golden['params']
    return neck.eval(), head.eval(), cases


def test_semantic_fpn_logits_and_loss(semantic):
    neck, head, cases = semantic
    case = cases['head_256x320']
    with torch.no_grad():
        features = neck(maps(case))
        for i, ours in enumerate(features):
            probe.compare(ours, case['outputs'][f'fpn{i}'])
        probe.compare(head(features), case['outputs']['logits'])
        n, i, j = torch.meshgrid(torch.arange(2), torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing='ij')
        labels = ((i // 4) * 7 + (j // 8) * 3 + n) % 19
        labels[(i + j) % 17 == 0] = 255
        losses = head.loss(features, [{'mask': mask} for mask in labels])
    recorded = cases['loss_256x320']['outputs']
    assert losses['loss_seg'].item() == pytest.approx(recorded['loss_ce'], rel=1e-4)
    assert losses['pixel_accuracy'].item() * 100 == pytest.approx(recorded['acc_seg'], abs=0.02)


def test_semantic_fpn_gradients(semantic):
    neck, head, cases = semantic
    case = cases['grad']
    inputs = [x.requires_grad_() for x in maps(case)]
    head(neck(inputs)).square().mean().backward()
    for i, x in enumerate(inputs):
        probe.compare(x.grad, case['outputs'][f'grad_input{i}'], relative=1e-3)
    probe.compare(
        head.scale_heads[3][4].conv.weight.grad,
        case['outputs']['grad_decode_head.scale_heads.3.4.conv.weight'],
        relative=1e-3,
    )
    probe.compare(
        neck.inner_blocks[0][0].weight.grad, case['outputs']['grad_neck.lateral_convs.0.conv.weight'], relative=1e-3
    )


# Detectors -------------------------------------------------------------------------------------------


def detector(kind, name, **options):
    golden, cases = load(name)
    config = golden['config']
    info = PyramidInfo([config['channels']] * 5, config['strides'])
    head = kind(feature_info=info, detections=config['dets'], **options)
    head.load_state_dict(probe.golden_state(golden))
    assert sum(p.numel() for p in head.parameters()) == golden['params']
    return head.eval(), cases


def test_retinanet():
    # torchvision keeps boxes that clipping left empty, and gives its label 0 a logit of its own.
    head, cases = detector(RetinaNet, 'tv_retinanet', num_classes=11, min_size=-1)
    case = cases['heads']
    with torch.no_grad():
        features = maps(case)
        logits, offsets = head(features)
        anchors = torch.cat(head.anchors.on(features))
        probe.compare(logits, case['outputs']['cls_logits'])
        probe.compare(offsets, case['outputs']['bbox_regression'])
        probe.compare(anchors, case['outputs']['anchors'])
        torch.testing.assert_close(anchors[:9], torch.tensor(case['outputs']['first_anchors']))
        compare_detections(head.predict(features, [SIZE] * 2), cases['detections']['outputs'])
    compare_losses(
        head, cases['loss'], targets_of(cases['loss']), {'loss_cls': 'classification', 'loss_box': 'bbox_regression'}
    )


def test_fcos():
    head, cases = detector(FCOS, 'tv_fcos', num_classes=11, score_threshold=0.05, min_size=-1)
    case = cases['heads']
    with torch.no_grad():
        features = maps(case)
        for ours, name in zip(head(features), ('cls_logits', 'bbox_regression', 'bbox_ctrness'), strict=True):
            probe.compare(ours, case['outputs'][name])
        compare_detections(head.predict(features, [SIZE] * 2), cases['detections']['outputs'])
    compare_losses(
        head,
        cases['loss'],
        targets_of(cases['loss']),
        {'loss_cls': 'classification', 'loss_box': 'bbox_regression', 'loss_centerness': 'bbox_ctrness'},
    )


@pytest.mark.parametrize(
    ('make', 'convert', 'name', 'outputs', 'terms'),
    [
        pytest.param(
            partial(ATSS, nms_threshold=0.5),
            atss.convert,
            'mmdet_atss_head',
            [('cls', 10), ('reg', 4), ('ctr', 1)],
            {'loss_cls': 'loss_cls', 'loss_box': 'loss_bbox', 'loss_centerness': 'loss_centerness'},
            id='atss',
        ),
        pytest.param(
            partial(GFL, nms_threshold=0.5),
            atss.convert,
            'mmdet_gfl_head',
            [('cls', 10), ('reg', 68)],
            {'loss_cls': 'loss_cls', 'loss_box': 'loss_bbox', 'loss_distribution': 'loss_dfl'},
            id='gfl',
        ),
        pytest.param(
            partial(FCOS, **fcos.MMDETECTION),
            fcos.convert,
            'mmdet_fcos_head_tricks',
            [('cls', 10), ('reg', 4), ('ctr', 1)],
            {'loss_cls': 'loss_cls', 'loss_box': 'loss_bbox', 'loss_centerness': 'loss_centerness'},
            id='fcos_tricks',
        ),
        pytest.param(
            partial(FCOS, **fcos.FIRST),
            fcos.convert,
            'mmdet_fcos_head',
            [('cls', 10), ('reg', 4), ('ctr', 1)],
            {'loss_cls': 'loss_cls', 'loss_box': 'loss_bbox', 'loss_centerness': 'loss_centerness'},
            id='fcos_first',
        ),
        pytest.param(
            partial(RetinaNet, **retinanet.MMDETECTION),
            retinanet.convert,
            'mmdet_retina_head',
            [('cls', 90), ('reg', 36)],
            {'loss_cls': 'loss_cls', 'loss_box': 'loss_bbox'},
            id='retinanet',
        ),
    ],
)
def test_mmdet_one_stage(make, convert, name, outputs, terms):
    golden, cases = load(name)
    config = golden['config']
    info = PyramidInfo([config['channels']] * 5, config['strides'])
    head = make(feature_info=info, num_classes=10)
    head.load_state_dict(convert(probe.golden_state(golden)))
    assert sum(p.numel() for p in head.parameters()) == golden['params']
    case = cases['heads']
    shared = sum(x.shape[-2] * x.shape[-1] for x in maps(case))
    with torch.no_grad():
        features = maps(case)
        for ours, (key, width) in zip(head.eval()(features), outputs, strict=True):
            start = 0
            for level, x in enumerate(features):
                anchors = ours.shape[1] // shared
                stop = start + x.shape[-2] * x.shape[-1] * anchors
                grid = ours[:, start:stop].unflatten(1, (*x.shape[-2:], anchors)).flatten(3).permute(0, 3, 1, 2)
                assert grid.shape[1] == width
                # MMDetection gives FCOS's distances in pixels in evaluation.
                pixels = config['strides'][level] if key == 'reg' and isinstance(head, FCOS) else 1
                probe.compare(grid * pixels, case['outputs'][f'{key}{level}'])
                start = stop
        compare_detections(head.predict(features, [SIZE] * 2), cases['detections']['outputs'])
    # Theirs are lists of levels, and gradients are of their sum.
    recorded = {**cases['loss'], 'outputs': {}}
    for key, value in cases['loss']['outputs'].items():
        if key.startswith('grad_'):
            (key,) = convert({key[5:]: None})
            recorded['outputs'][f'grad_{key}'] = value
        else:
            recorded['outputs'][key] = sum(value) if isinstance(value, list) else value
    compare_losses(head, recorded, targets_of(recorded), terms)


@pytest.fixture(scope='module')
def mask_rcnn():
    # torchvision's 11 classes are background and our 10; all samples are used, so that nothing is random.
    return detector(
        MaskRCNN,
        'tv_maskrcnn',
        num_classes=10,
        rpn_pre_nms=(400, 400),
        rpn_post_nms=(200, 200),
        rpn_batch=10**6,
        roi_batch=10**6,
        score_threshold=0.02,
        mask_threshold=None,
    )


def shifted(targets):
    return [{**t, 'labels': t['labels'] - 1} for t in targets]


def test_mask_rcnn_parts(mask_rcnn):
    head, cases = mask_rcnn
    stored = cases['heads']['outputs']
    features = maps(cases['heads'])
    boxes = [t['boxes'] for t in targets_of(cases['loss'])]
    with torch.no_grad():
        for level, (objectness, offsets) in enumerate(zip(*head.rpn.head(features))):
            probe.compare(objectness, stored[f'rpn_objectness{level}'])
            probe.compare(offsets, stored[f'rpn_deltas{level}'])
        proposals, _ = head.rpn.propose(features, *head(features), [SIZE] * 2, None)
        assert [len(p) for p in proposals] == stored['rpn_proposal_counts']
        probe.compare(proposals[0], stored['rpn_proposals_img0'])
        parts, levels = head.roi_heads, head._roi_maps(features)
        pooled = parts.box_roi_pool(levels, boxes, [SIZE] * 2)
        probe.compare(pooled, stored['gt_roi_pooled'])
        vectors = parts.box_head(pooled)
        probe.compare(vectors, stored['gt_roi_box_features'])
        for ours, name in zip(parts.box_predictor(vectors), ('class_logits', 'box_regression'), strict=True):
            probe.compare(ours, stored[f'gt_roi_{name}'])
        pooled = parts.mask_roi_pool(levels, boxes, [SIZE] * 2)
        probe.compare(pooled, stored['gt_roi_mask_pooled'])
        probe.compare(parts.mask_predictor(parts.mask_head(pooled)), stored['gt_roi_mask_logits'])


def test_mask_rcnn_detections(mask_rcnn):
    head, cases = mask_rcnn
    recorded = cases['detections']['outputs']
    with torch.no_grad():
        results = head.predict(maps(cases['detections']), [SIZE] * 2)
    compare_detections([{**r, 'labels': r['labels'] + 1} for r in results], recorded)
    for ours, theirs in zip(results, recorded, strict=True):
        probe.compare(ours['masks'][:, None], theirs['masks'])


def test_mask_rcnn_loss(mask_rcnn):
    head, cases = mask_rcnn
    names = ('loss_classifier', 'loss_box_reg', 'loss_mask', 'loss_objectness', 'loss_rpn_box_reg')
    compare_losses(head, cases['loss'], shifted(targets_of(cases['loss'])), {name: name for name in names})
