"""Without this DETR, Deformable DETR and RT-DETR could drift from the published systems: outputs, matches, losses,
gradients and detections are compared with what the authors' and MMDetection's code gave for the same weights and
maps."""

import probe
import pytest
import torch

from densezoo.heads import DETR, RTDETR, DeformableDETR, HybridEncoder, PyramidInfo, deformable_detr, detr
from densezoo.heads.set_prediction import Objects

SIZE = (256, 320)


def load(name):
    golden = probe.load(f'heads/{name}')
    return golden, {case['name']: case for case in golden['cases']}


def original(name):
    """(DETR with the authors' weights, config, cases, map)."""
    golden, cases = load(name)
    config = golden['config']
    head = DETR(
        feature_info=PyramidInfo([512], [32]),
        num_classes=config['num_classes'],
        num_queries=config['num_queries'],
        channels=config['d_model'],
        num_heads=config['heads'],
        hidden=config['ffn'],
        encoder_layers=config['layers'],
        decoder_layers=config['layers'],
        pre_norm=config['pre_norm'],
        dropout=0.0,
        min_size=-1,
    )
    head.load_state_dict(detr.convert(probe.golden_state(golden)))
    assert sum(p.numel() for p in head.parameters()) == golden['params']
    return head.eval(), cases, probe.image(cases['eval']['seed'], cases['eval']['shape'])


ORIGINALS = ['fb_detr_l2', 'fb_detr_prenorm_l2', pytest.param('fb_detr', marks=pytest.mark.slow)]


@pytest.mark.parametrize('name', ORIGINALS)
def test_original_outputs_and_gradients(name):
    head, cases, x = original(name)
    recorded = cases['eval']['outputs']
    logits, boxes = head([x])
    probe.compare(logits[-1], recorded['pred_logits'])
    probe.compare(boxes[-1], recorded['pred_boxes'])
    probe.compare(logits[0], recorded['aux0_logits'])
    probe.compare(boxes[0], recorded['aux0_boxes'])
    (logits[-1].square().mean() + boxes[-1].square().mean()).backward()
    recorded = cases['loss']['outputs']
    cross = head.decoder.layers[1].multihead_attn
    for ours, theirs in (
        (head.input_proj.weight, 'input_proj.weight'),
        (cross.in_proj_weight, 'transformer.decoder.layers.1.multihead_attn.in_proj_weight'),
        (head.query_embed.weight, 'query_embed.weight'),
    ):
        probe.compare(ours.grad, recorded[f'grad_{theirs}'], relative=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('name', ORIGINALS)
def test_original_matches_losses_and_results(name):
    head, cases, x = original(name)
    logits, boxes = head([x])
    case = cases['loss']
    counts = [len(target['labels']) for target in case['targets']]
    truth = Objects(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), counts, torch.tensor(4.0))
    for i, target in enumerate(case['targets']):
        truth.boxes[i, : counts[i]] = torch.tensor(target['boxes_cxcywh'])
        truth.labels[i, : counts[i]] = torch.tensor(target['labels'])
    matched = head.match(logits, boxes, truth)
    for ours, (queries, objects) in zip(matched[-1], case['outputs']['indices'], strict=True):
        assert (ours >= 0).nonzero()[:, 0].tolist() == queries and ours[queries].tolist() == objects
    losses = head.losses(logits, boxes, truth, matched)
    layers = len(logits)
    for theirs, ours in (('ce', 'cls'), ('bbox', 'box'), ('giou', 'giou')):
        for i in range(layers):
            expected = case['outputs']['losses'][f'loss_{theirs}' + ('' if i == layers - 1 else f'_{i}')]
            value = losses[f'loss_{ours}'][i].item() / head.weights[f'loss_{ours}']
            assert value == pytest.approx(expected, rel=1e-4)
    results = head.predict([x], [SIZE] * 2)
    for result, recorded in zip(results, cases['eval']['outputs']['post'], strict=True):
        # theirs are in the queries' order, the first of them recorded, and not clipped
        limit = torch.tensor([320.0, 256, 320, 256])
        wanted = torch.tensor(recorded['boxes']).clamp(torch.zeros(4), limit)
        assert len(wanted) >= 10
        for box, score, label in zip(wanted, recorded['scores'], recorded['labels'], strict=True):
            off = (result['boxes'] - box).abs().amax(1) / limit.max() + (result['scores'] - score).abs()
            assert off.min() < 1e-4 and result['labels'][off.argmin()] == label


def mmdet(name):
    """(head, config, cases) under MMDetection's names."""
    golden, cases = load(name)
    config = golden['config']
    options = {
        'feature_info': PyramidInfo(config['in_channels'], config['strides']),
        'num_classes': config['num_classes'],
        'num_queries': config['num_queries'],
        'encoder_layers': config['encoder_layers'],
        'decoder_layers': config['decoder_layers'],
        'dropout': 0.0,
        'detections': min(100, config['num_queries']),
        'min_size': -1,
    }
    state = probe.golden_state(golden)
    if 'deformable' in name:
        two_stages = 'twostage' in name
        refine = two_stages or 'refine' in name
        head = DeformableDETR(refine=refine, two_stages=two_stages, **options)
        for tied in config['tied']:
            for key in tied:
                state[key] = state[tied[-1]]
        state = deformable_detr.convert(state, len(config['in_channels']), refine)
    else:
        head = DETR(**options)
        state = detr.convert(state)
    head.load_state_dict(state)
    return head.eval(), cases


def gradient_of(head, key):
    """The gradient of the parameter that MMDetection calls `key`."""
    if isinstance(head, DETR):
        (ours,) = detr.convert({key: torch.zeros(1)})
    else:
        ours = next(iter(deformable_detr.convert({key: torch.zeros(1)}, 3, head.refine)))
    return dict(head.named_parameters())[ours].grad


MMDET = [
    'mmdet_detr_l2',
    'mmdet_deformable_detr_twostage_l2',
    pytest.param('mmdet_deformable_detr_refine_l2', marks=pytest.mark.slow),
    pytest.param('mmdet_deformable_detr_l2', marks=pytest.mark.slow),
    pytest.param('mmdet_detr', marks=pytest.mark.slow),
    pytest.param('mmdet_deformable_detr', marks=pytest.mark.slow),
]


@torch.no_grad()
@pytest.mark.parametrize('name', MMDET)
def test_mmdet_outputs_and_detections(name):
    head, cases = mmdet(name)
    case = cases['eval']
    features = [probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'], strict=True)]
    logits, boxes = head(features)
    probe.compare(logits, case['outputs']['all_cls'])
    probe.compare(boxes, case['outputs']['all_box'])
    last = head.last_layer(features, None)
    torch.testing.assert_close(last[0], logits[-1])
    torch.testing.assert_close(last[1], boxes[-1])
    for result, recorded in zip(head.predict(features, [SIZE] * 2), case['outputs']['detections'], strict=True):
        count = len(recorded['scores'])
        assert len(result['scores']) == recorded['count']
        torch.testing.assert_close(result['scores'][:count], torch.tensor(recorded['scores']), rtol=1e-4, atol=1e-5)
        agree = (result['boxes'][:count] - torch.tensor(recorded['boxes'])).abs().amax(1) < 0.05
        assert agree.float().mean() > 0.9  # neighbours of equal score may change places


# Of the Deformable DETR of six layers no losses were recorded.
@pytest.mark.parametrize('name', MMDET[:-1])
def test_mmdet_losses_and_gradients(name):
    head, cases = mmdet(name)
    case = cases['loss']
    head.train()
    features = [probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'], strict=True)]
    targets = [{key: torch.tensor(value) for key, value in target.items()} for target in case['targets']]
    losses = head.loss(features, [{**target, 'size': SIZE} for target in targets])
    for theirs, ours in (('cls', 'cls'), ('bbox', 'box'), ('iou', 'giou')):
        assert losses[f'loss_{ours}'].item() == pytest.approx(case['outputs'][f'loss_{theirs}'], rel=1e-4)
        for layer in range(len(head.decoder.layers) - 1):
            expected = case['outputs'][f'd{layer}.loss_{theirs}']
            assert losses[f'loss_{ours}_{layer}'].item() == pytest.approx(expected, rel=1e-4)
        if f'enc_loss_{theirs}' in case['outputs']:
            assert losses[f'loss_{ours}_encoder'].item() == pytest.approx(
                case['outputs'][f'enc_loss_{theirs}'], rel=1e-4
            )
    sum(losses.values()).backward()
    gradients = {key: value for key, value in case['outputs'].items() if key.startswith('grad_')}
    assert gradients
    for key, stored in gradients.items():
        probe.compare(gradient_of(head, key.removeprefix('grad_')), stored, relative=1e-3)


def test_rtdetr():
    golden, cases = load('rtdetr_l2')
    config, case = golden['config'], cases['train']
    options = {'num_heads': config['num_heads'], 'hidden': config['hidden']}
    neck = HybridEncoder(
        feature_info=PyramidInfo(config['in_channels'], config['strides']),
        out_channels=config['channels'],
        encoder_layers=config['encoder_layers'],
        expansion=config['expansion'],
        **options,
    )
    head = RTDETR(
        feature_info=neck.feature_info,
        num_classes=config['num_classes'],
        num_queries=config['num_queries'],
        channels=config['channels'],
        num_points=config['num_points'],
        decoder_layers=config['decoder_layers'],
        **options,
    )
    both = torch.nn.ModuleDict({'encoder': neck, 'decoder': head})
    assert sum(p.numel() for p in both.parameters()) == golden['params']
    loaded = both.load_state_dict(probe.golden_state(golden), strict=False)
    assert not loaded.unexpected_keys and all(key.endswith('num_batches_tracked') for key in loaded.missing_keys)
    both.eval()
    head.num_denoising = 0

    maps = neck([probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'], strict=True)])
    recorded = case['outputs']
    for i, x in enumerate(maps):
        probe.compare(x, recorded[f'neck{i}'])
    logits, boxes = head(maps)
    probe.compare(logits, recorded['all_cls'])
    probe.compare(boxes, recorded['all_box'])
    _, chosen_logits, start = head.select(*head.encode(maps))
    probe.compare(chosen_logits, recorded['enc_cls'])
    probe.compare(start.sigmoid(), recorded['enc_box'])

    targets = [{key: torch.tensor(value) for key, value in target.items()} for target in case['targets']]
    losses = head.loss(maps, targets)
    for suffix, theirs in (('', ''), ('_0', '_aux_0'), ('_encoder', '_aux_1')):
        for ours, name in (('cls', 'vfl'), ('box', 'bbox'), ('giou', 'giou')):
            value = losses[f'loss_{ours}{suffix}'].item()
            assert value == pytest.approx(recorded[f'loss_{name}{theirs}'], rel=1e-4)
    sum(losses.values()).backward()
    parameters = dict(both.named_parameters())
    gradients = {key.removeprefix('grad_'): value for key, value in recorded.items() if key.startswith('grad_')}
    assert len(gradients) == 6
    for key, stored in gradients.items():
        probe.compare(parameters[key].grad, stored, relative=1e-3)
