"""Without this Mask2Former could drift from the published one (head, gradients, matching, losses and decoding are
compared with what the authors' code gave), or break on a picture without objects."""

import probe
import pytest
import torch
import torch.nn.functional as F
from tiny_tasks import SMALL as TINY
from torch.export import Dim, export

from densezoo.backbones import create_model
from densezoo.heads import Mask2Former, PyramidInfo, mask_loss
from densezoo.heads.mask2former import convert
from densezoo.heads.mask2former_decoder import Attention, where_to_look
from densezoo.heads.mask2former_pixel_decoder import centres
from densezoo.heads.mask_loss import Points
from densezoo.heads.universal import Segments, instances, panoptic_by_argmax, semantic_map
from densezoo.train import UniversalSegmentor
from densezoo.train.optim import parameter_groups

INPUTS = PyramidInfo([64, 128, 320, 512], [4, 8, 16, 32])
SMALL = PyramidInfo([8, 12, 16, 24], [4, 8, 16, 32])


def load(name):
    golden = probe.load(f'heads/{name}')
    return golden, {case['name']: case for case in golden['cases']}


def recorded_head(name):
    golden, cases = load(name)
    config = golden['config']
    head = Mask2Former(
        feature_info=INPUTS, num_classes=config['nc'], things=5, num_queries=config['q'], channels=config['conv'],
        mask_channels=config['mask'], encoder_layers=config['enc'], encoder_hidden=config['encoder_ffn'],
        decoder_layers=config['dec'], hidden=config['ffn'], num_heads=config['heads'],
    )  # fmt: skip
    head.load_state_dict(convert(probe.golden_state(golden)))
    assert sum(p.numel() for p in head.parameters()) == golden['params']
    return head.eval(), cases


def recorded_maps(case):
    return [probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'])]


RECORDED = ['mask2former_head_s', pytest.param('mask2former_head', marks=pytest.mark.slow)]


@pytest.mark.parametrize('name', RECORDED)
def test_head(name):
    head, cases = recorded_head(name)
    case = cases['head_256x320']
    stored = case['outputs']
    with torch.no_grad():
        maps = head.pixel_decoder(recorded_maps(case))
        classes, masks = head.predictor(maps.levels, maps.mask)
    probe.compare(maps.mask, stored['mask_features'])
    for i, level in enumerate(maps.levels):
        probe.compare(level, stored[f'multi_scale{i}'])
    noise = case['sensitivity_1e6']
    probe.compare(classes[-1], stored['pred_logits'], noise['logits'])
    probe.compare(masks[-1], stored['pred_masks'], noise['masks'])
    for i in range(2):
        probe.compare(classes[i], stored[f'aux{i}_logits'], noise['logits'])
        probe.compare(masks[i], stored[f'aux{i}_masks'], noise['masks'])


@pytest.mark.parametrize('name', RECORDED)
def test_gradients(name):
    head, cases = recorded_head(name)
    case = cases['grad_128x160']
    maps = [x.requires_grad_() for x in recorded_maps(case)]
    classes, masks = head(maps)
    (classes.square().mean() + masks.square().mean()).backward()
    ours = convert({key[5:]: key for key in case['outputs']})
    for i, x in enumerate(maps):
        probe.compare(x.grad, case['outputs'][f'grad_res{i + 2}'], relative=1e-3)
    assert len(ours) == 3
    for key, theirs in ours.items():
        probe.compare(head.get_parameter(key).grad, case['outputs'][theirs], relative=1e-3)


def recorded_prediction():
    masks = probe.image(51, [2, 12, 24, 32])
    masks = masks + 1.5 * F.interpolate(probe.image(52, [2, 12, 3, 4]), size=(24, 32), mode='bilinear')
    return probe.image(50, [2, 12, 8]), masks


def recorded_segments(h=96, w=128):
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    labels, masks = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, h, w, dtype=torch.bool)
    for picture, kinds in enumerate([[1, 4, 6], [0, 3]]):
        n = len(kinds)
        labels[picture, :n] = torch.tensor(kinds)
        for i in range(n):
            ellipse = (x - (w * (i + 1)) // (n + 1)) ** 2 * 4 + (y - (h * (n - i)) // (n + 1)) ** 2 * 3
            masks[picture, i] = ellipse < (h * (5 + i)) ** 2 // 60
    return Segments(labels, masks, [3, 2])


def test_matching_and_losses():
    _, cases = load('mask2former_matcher_losses')
    (classes, masks), segments = recorded_prediction(), recorded_segments()
    points = probe.image(53, [1, 500, 2]).sigmoid()
    two = torch.stack([classes, classes.flip(1)]), torch.stack([masks, masks.flip(1)])  # a second layer, turned round
    costs = mask_loss.matching_costs(*two, segments, points.expand(2, -1, -1))
    matched = mask_loss.match(*two, segments, points.expand(2, -1, -1))
    stored = cases['matcher']['outputs']
    for i, (queries, columns) in enumerate(stored['indices']):
        cost = torch.tensor(stored['cost'][i])
        torch.testing.assert_close(costs[0, i, :, : cost.shape[1]], cost, rtol=1e-4, atol=1e-5)
        expected = torch.full((12,), -1)
        expected[torch.tensor(queries)] = torch.tensor(columns)
        assert torch.equal(matched[0, i], expected) and torch.equal(matched[1, i], expected.flip(0))
    stored = cases['losses']['outputs']
    entropy, dice = mask_loss.mask_losses(
        two[1], matched, segments, torch.tensor(5.0), Points(), points.expand(5, -1, -1)
    )
    for layer in range(2):
        assert mask_loss.class_losses(two[0], matched, segments)[layer].item() == pytest.approx(
            stored['loss_ce'], rel=1e-4
        )
        assert entropy[layer].item() == pytest.approx(stored['loss_mask'], rel=1e-4)
        assert dice[layer].item() == pytest.approx(stored['loss_dice'], rel=1e-4)


def test_decoding():
    _, cases = load('mask2former_matcher_losses')
    stored = cases['inference']['outputs']
    classes, masks = recorded_prediction()
    classes = 0.3 * classes[0]
    classes[torch.arange(12), torch.tensor([1, 5, 5, 2, 6, 6, 3, 7, 0, 4, 4, 1])] += 4
    classes, masks = classes.softmax(-1), (4 * masks[0]).sigmoid()
    ids, labels, _ = panoptic_by_argmax(classes, masks, things=range(4), score_threshold=0.3, overlap_threshold=0.15)
    assert ids.tolist() == stored['panoptic_map']
    assert labels.tolist() == [segment['category_id'] for segment in stored['segments']]
    probe.compare(semantic_map(classes, masks), stored['semantic'])
    found = instances(classes, masks, things=range(4), threshold=0.5, limit=10)
    count = len(found['scores'])
    assert count == sum(area > 0 for area in stored['instance_mask_areas_sorted'])
    torch.testing.assert_close(found['scores'], torch.tensor(stored['instance_scores_sorted'][:count]))
    assert found['labels'].tolist() == stored['instance_classes_sorted'][:count]


# properties -------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(0)
    settings = dict(
        feature_info=SMALL, num_classes=5, things=2, num_queries=6, channels=16, mask_channels=8, encoder_layers=1,
        encoder_hidden=16, decoder_layers=4, hidden=16, num_heads=4, loss_points=50, score_threshold=0.0,
    )  # fmt: skip
    return Mask2Former(**{**settings, **options})


def maps(batch=2, size=(64, 96), info=SMALL):
    torch.manual_seed(1)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(info.channels(), info.reduction())
    ]


def target(*objects, size=(64, 96), stuff=3):
    """Objects (label, y0, x0, y1, x1) on stuff of one class."""
    mask = torch.full(size, stuff)
    masks = torch.zeros(len(objects), *size, dtype=torch.bool)
    for one, (label, y0, x0, y1, x1) in zip(masks, objects):
        one[y0:y1, x0:x1] = True
        mask[one] = label
    return {'mask': mask, 'masks': masks, 'labels': torch.tensor([o[0] for o in objects], dtype=torch.int64)}


HARD = {
    'objects': [target((0, 4, 4, 30, 40), (1, 20, 50, 60, 90)), target((1, 0, 0, 64, 50))],
    'no objects': [target(), target()],
    'all void': [target(stuff=255), target(stuff=255)],
    'one of them void': [target((0, 4, 4, 30, 40)), target(stuff=255)],
    'one pixel': [target((0, 5, 5, 6, 6)), target((1, 1, 2, 2, 3), (0, 63, 95, 64, 96))],
    'more objects than queries': [target(*[(i % 2, 4 * i, 8 * i, 4 * i + 4, 8 * i + 8) for i in range(9)]), target()],
}


@pytest.mark.parametrize('kind', ['panoptic', 'instance', 'semantic'])
@pytest.mark.parametrize('name', HARD)
def test_hard_targets_train(name, kind):
    head = small(kind=kind)
    losses = head.loss(maps(), HARD[name])
    assert all(torch.isfinite(value) and value >= 0 for value in losses.values()), losses
    sum(losses.values()).backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    nothing = ('void' in name and 'one' not in name) or (name, kind) == ('no objects', 'instance')
    assert (losses['loss_mask'] == 0) == nothing and losses['loss_class'] > 0


def test_weights_scale_losses_and_costs_alone_decide_who_is_matched():
    def losses(**options):
        head = small(**options)
        torch.manual_seed(2)
        return head.loss(maps(), HARD['objects'])

    published, light = losses(), losses(class_weight=4.0, mask_weight=1.0, dice_weight=0.5)
    for name, factor in (('loss_class', 2.0), ('loss_mask_aux', 0.2), ('loss_dice', 0.1)):
        torch.testing.assert_close(light[name], factor * published[name])
    assert losses(class_cost=0.0, dice_cost=0.0)['loss_dice'] != published['loss_dice']


def test_order_of_objects_does_not_matter():
    head, objects = small().eval(), [(0, 4, 4, 30, 40), (1, 20, 50, 60, 90), (0, 40, 0, 60, 20)]
    classes, masks = head.predictions(maps(1))
    points = torch.rand(1, 200, 2)
    seen = []
    for order in (objects, objects[::-1]):
        segments = head.gather([target(*order)], (64, 96), ['panoptic'])
        stacked = torch.stack(classes), torch.stack(masks)
        matched = mask_loss.match(*stacked, segments, points)
        count = torch.tensor(4.0)
        every = points.expand(4, -1, -1)
        terms = mask_loss.mask_losses(stacked[1], matched, segments, count, Points(), every)
        seen.append(torch.stack([*terms, mask_loss.class_losses(stacked[0], matched, segments)]))
    torch.testing.assert_close(*seen)


def test_segments_without_a_query_cost_nothing():
    torch.manual_seed(0)
    classes, masks, points = torch.randn(1, 1, 1, 6), torch.randn(1, 1, 1, 16, 24), torch.rand(1, 100, 2)
    head = small()
    both = head.gather([target((0, 4, 4, 30, 40), (1, 20, 50, 60, 90))], (64, 96), ['instance'])
    matched = mask_loss.match(classes, masks, both, points)
    kept = int(matched)
    one = Segments(both.labels[:, kept : kept + 1], both.masks[:, kept : kept + 1], [1])
    total = torch.tensor(2.0)
    ours = mask_loss.mask_losses(masks, matched, both, total, Points(), points.expand(2, -1, -1))
    alone = mask_loss.mask_losses(masks, torch.zeros_like(matched), one, total, Points(), points)
    torch.testing.assert_close(ours, alone)


def test_batch_equals_singles_and_results_fit():
    head, features = small(overlap_threshold=0.0).eval().double(), [f.double() for f in maps()]
    sizes, originals = [(64, 96), (50, 70)], [(128, 192), (25, 33)]
    with torch.no_grad():
        together = head.predict(features, sizes, originals)
        for i, result in enumerate(together):
            alone = head.predict([f[i : i + 1] for f in features], sizes[i : i + 1], originals[i : i + 1])[0]
            assert result.keys() == alone.keys() == {
                'mask', 'panoptic', 'segment_labels', 'segment_scores', 'boxes', 'labels', 'scores', 'masks'
            }  # fmt: skip
            for key, value in result.items():
                torch.testing.assert_close(value, alone[key], msg=key)
            assert result['mask'].shape == result['panoptic'].shape == originals[i]
            assert result['masks'].shape[1:] == originals[i] and len(result['scores']) > 0
            assert result['panoptic'].max() == len(result['segment_labels'])
            assert set(result['labels'].tolist()) <= {0, 1} and (result['scores'].diff() <= 0).all()


def test_finer_masks():
    head = small(sub_pixel=2).eval()
    with torch.no_grad():
        assert head(maps())[1].shape == (2, 6, 32, 48)
        assert head.predict(maps(1), [(60, 96)])[0]['mask'].shape == (60, 96)
    assert all(torch.isfinite(value) for value in head.train().loss(maps(), HARD['one pixel']).values())


@pytest.mark.parametrize('things', [2, 0])
def test_seeds_are_further_queries(things):
    head, features = small(num_seeds=4, things=things).eval(), maps()
    with torch.no_grad():
        classes, masks = head(features)
        assert classes.shape == (2, 6 + 4, 6) and masks.shape == (2, 6 + 4, 16, 24)
        assert {'masks', 'panoptic', 'mask'} < head.predict(features, [(64, 96)] * 2)[0].keys()
    losses = head.train().loss(features, HARD['no objects'])
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_rates_and_decay_of_parameters():
    task = UniversalSegmentor(backbone=create_model(features_only=True, **TINY), head=small(lr_scale=0.25))
    groups = parameter_groups(task, lr=1.0, weight_decay=0.1)
    of = {name: group for group in groups for name in group['names']}
    assert of['head.predictor.mask_embed.layers.0.weight']['lr'] == 0.25
    stem = of['backbone.downsample_layers.0.conv.weight']
    assert stem['lr'] == 1.0 and stem['weight_decay'] == 0.1
    assert of['head.predictor.query_feat.weight']['weight_decay'] == 0


def test_only_the_tasks_asked_for():
    with torch.no_grad():
        assert small(tasks=('semantic',)).eval().predict(maps(1), [(64, 96)])[0].keys() == {'mask'}


def test_no_confident_query_gives_an_empty_map():
    with torch.no_grad():
        result = small(score_threshold=1.0).eval().predict(maps(1), [(64, 96)])[0]
    assert not result['panoptic'].any() and len(result['segment_labels']) == 0


def test_attention_is_torchs():
    torch.manual_seed(0)
    layer = Attention(channels=16, num_heads=4, pre_norm=False)
    x, place, memory, position = torch.randn(2, 5, 16), torch.randn(5, 16), torch.randn(2, 7, 16), torch.randn(1, 7, 16)
    seen = torch.rand(2, 5, 7) > 0.4
    seen[..., 0] = True
    theirs = layer.attention(
        x + place, memory + position, memory, attn_mask=~seen.repeat_interleave(4, 0), need_weights=False
    )[0]
    torch.testing.assert_close(layer(x, place, memory, position, seen), layer.norm(x + theirs))


def test_a_query_without_a_mask_looks_everywhere():
    masks = torch.tensor([1.0, -1.0])[None, :, None, None].repeat(1, 1, 4, 6)
    masks[0, 0, :, 3:] = -5
    seen = where_to_look(masks, (2, 3)).unflatten(2, (2, 3))[0]
    assert seen[0].tolist() == [[True, False, False]] * 2 and seen[1].all()


def test_centres_are_x_then_y_of_each_level():
    places = centres([(1, 2), (2, 1)], torch.device('cpu'))[0, :, 0]
    assert places.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_uncertain_points_lie_near_the_border():
    torch.manual_seed(0)
    logits = torch.linspace(-1, 1, 32).expand(3, 1, 16, 32)  # zero in the middle column
    points = mask_loss.uncertain_points(logits, Points(200, 3.0, 0.75))
    assert points.shape == (3, 200, 2)
    distance = (points[..., 0] - 0.5).abs()
    assert distance[:, :150].max() < 0.25 and distance[:, 150:].max() > 0.4


def test_exported_equals_eager():
    head, features = small(decoder_layers=1).eval(), maps()
    batch = Dim('batch', min=2, max=16)
    program = export(head, (features,), dynamic_shapes=([{0: batch} for _ in features],)).module()
    other = [torch.cat([f, f.flip(-1)]) for f in features]
    with torch.no_grad():
        for ours, theirs in zip(program(other), head(other), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_losses_are_float32_under_autocast():
    head = small()
    with torch.autocast('cpu', torch.bfloat16):
        losses = head.loss(maps(), HARD['objects'])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


ERRORS = [
    (lambda: small(kind='semantics'), "kind must be one of .* did you mean 'semantic'"),
    (lambda: small(channels=18), 'channels must be a multiple of 4'),
    (lambda: small(num_heads=3), 'channels must be a multiple of num_heads=3, got 16'),
    (lambda: small(num_seeds=-1), 'num_seeds must not be negative, got -1'),
    (lambda: small(num_levels=5), 'needs three maps or more and num_levels of them, got 4 maps, num_levels=5'),
    (lambda: small(important=2), r'important in \[0, 1\], got loss_points=50, oversample=3.0, important=2'),
    (lambda: small(sub_pixel=3), 'sub_pixel must be a divisor of the first stride 4, got 3'),
    (lambda: small(lr_scale=0), 'lr_scale must be positive, got 0'),
    (lambda: small(num_queries=0), 'num_queries must be at least 1, got 0'),
    (lambda: small(score_threshold=3), r'score_threshold must be in \[0, 1\], got 3'),
    (lambda: small().loss(maps(1), [target(stuff=7)]), r'class ids must be 0\.\.4, or 255 in mask, got 7'),
    (lambda: small()(maps(info=INPUTS)), r'maps with channels \[8, 12, 16, 24\], got \[64, 128, 320, 512\]'),
]


@pytest.mark.parametrize(('call', 'message'), [pytest.param(c, m, id=str(i)) for i, (c, m) in enumerate(ERRORS)])
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)
