"""Without this kMaX-DeepLab could drift from the published one (attention, layers, head, matching, losses, decoding are
compared with what the authors' code gave), break on a picture without objects, or change with its neighbours in a
batch."""

import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.heads import KMaXDeepLab, PyramidInfo, kmax_loss
from densezoo.heads.kmax import convert
from densezoo.heads.kmax_decoder import KMaXLayer, Prediction
from densezoo.heads.kmax_pixel_decoder import AxialAttention2d
from densezoo.heads.universal import Segments, instances, panoptic_in_order, semantic_map

INPUTS = PyramidInfo([64, 128, 320, 512], [4, 8, 16, 32])
SMALL = PyramidInfo([8, 12, 16, 24], [4, 8, 16, 32])


def load(name):
    golden = probe.load(f'heads/{name}')
    return golden, {case['name']: case for case in golden['cases']}


def fill(module, state):
    loaded = module.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and all(k.endswith('num_batches_tracked') for k in loaded.missing_keys)
    return module.eval()


def short(golden):
    """State under keys of a part: convert() expects whole heads."""
    state = {f'predictor.{k}': v for k, v in probe.golden_state(golden).items()}
    return {k.removeprefix('predictor.'): v for k, v in convert(state).items()}


def test_axial_attention():
    golden, cases = load('kmax_axial_attention')
    attention = fill(AxialAttention2d(32, 32), short(golden))
    assert sum(p.numel() for p in attention.parameters()) == golden['params']
    case = cases['axial_9x11']
    probe.compare(attention(probe.image(case['seed'], case['shape'])), case['outputs']['out'])


def test_layer_and_gradients():
    golden, cases = load('kmax_transformer_layer')
    layer = fill(KMaXLayer(64, 10), short(golden))
    assert sum(p.numel() for p in layer.parameters()) == golden['params']
    x, query = probe.image(10, [2, 64, 16, 20]).requires_grad_(), probe.image(11, [2, 256, 24]).requires_grad_()
    out, prediction = layer(query, x)
    stored = cases['layer']['outputs']
    probe.compare(out, stored['query_out'])
    probe.compare(prediction.classes, stored['class_logits'])
    probe.compare(prediction.masks, stored['mask_logits'])
    (out.square().mean() + prediction.masks.square().mean() + prediction.classes.square().mean()).backward()
    probe.compare(x.grad, stored['grad_pixel'], relative=1e-3)
    probe.compare(query.grad, stored['grad_query'], relative=1e-3)


def recorded_head(name):
    golden, cases = load(name)
    config = golden['config']
    head = KMaXDeepLab(
        feature_info=INPUTS,
        num_classes=config['num_classes'],
        things=5,
        num_queries=config['num_queries'],
        depths=config['dec_layers'],
        channels=config['dec_channels'],
        kinds=config['layer_types'],
        decoder_depths=config['trans_layers'],
    )
    fill(head, convert(probe.golden_state(golden)))
    assert sum(p.numel() for p in head.parameters()) == golden['params']
    return head, cases


@pytest.mark.parametrize('name', ['kmax_head_s_odd', pytest.param('kmax_head', marks=pytest.mark.slow)])
def test_head(name):
    head, cases = recorded_head(name)
    for case in cases.values():
        maps = [probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'])]
        with torch.no_grad():
            decoded = head.pixel_decoder(maps)
            predictions = head.predictor(decoded)
            semantic = head.auxiliary_semantic_predictor(maps[3], maps[1], maps[0])
        stored = case['outputs']
        last = predictions[-1]
        probe.compare(decoded[0], stored['panoptic_features'])
        for i in range(3):
            probe.compare(decoded[3 - i], stored[f'multi_scale{i}'])
        probe.compare(last.classes, stored['pred_logits'])
        probe.compare(last.masks, stored['pred_masks'])
        probe.compare(last.pixels, stored['pixel_feature'])
        for i in range(2):
            layer = head.predictor.resized(predictions[i], last.masks.shape[-2:])
            probe.compare(layer.classes, stored[f'aux{i}_logits'])
            probe.compare(layer.masks, stored[f'aux{i}_masks'])
        probe.compare(semantic, stored['aux_semantic'])


def recorded_prediction():
    masks = probe.image(61, [2, 12, 24, 32])
    masks = masks + 1.5 * F.interpolate(probe.image(62, [2, 12, 3, 4]), size=(24, 32), mode='bilinear')
    return Prediction(probe.image(60, [2, 12, 8]), masks, F.normalize(probe.image(63, [2, 16, 24, 32]), dim=1))


def test_matching_and_losses():
    _, cases = load('kmax_matcher_losses')
    stored = cases['matcher_losses']['outputs']
    y, x = torch.meshgrid(torch.arange(24), torch.arange(32), indexing='ij')
    labels, masks = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 24, 32, dtype=torch.bool)
    for i, kinds in enumerate([[1, 4, 6], [0, 3]]):
        labels[i, : len(kinds)] = torch.tensor(kinds)
        for j in range(len(kinds)):
            masks[i, j] = ((y // 7) * 3 + x // 9) % (len(kinds) + 2) == j
    prediction, segments = recorded_prediction(), Segments(labels, masks, [3, 2])
    dice, probability = kmax_loss.similarities(prediction, segments)
    for i, both in enumerate(stored['similarities']):
        torch.testing.assert_close(dice[i, :, : segments.counts[i]], torch.tensor(both['mask']), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            probability[i, :, : segments.counts[i]], torch.tensor(both['cls']), rtol=1e-4, atol=1e-6
        )
    truth = kmax_loss.match(prediction, segments)
    for i, (queries, columns) in enumerate(stored['indices']):
        kinds = labels[i, torch.tensor(columns)]
        assert truth.classes[i, torch.tensor(queries)].tolist() == kinds.tolist()
        assert (truth.classes[i] < 7).sum() == len(queries)
    mask, dice = kmax_loss.mask_losses(prediction.masks, truth)
    semantic = torch.where((y + x) % 9 == 0, 255, (y // 5 + x // 6) % 7).expand(2, -1, -1)
    losses = {
        'loss_ce': kmax_loss.class_loss(prediction.classes, truth),
        'loss_mask': mask,
        'loss_dice': dice,
        'loss_pixel_insdis': kmax_loss.pixel_loss(prediction.pixels, truth, 24 * 32),
        'loss_aux_semantic': kmax_loss.semantic_loss(
            probe.image(64, [2, 7, 24, 32]), semantic, truth, num_classes=7, samples=24 * 32
        ),
    }
    for name, value in losses.items():
        assert value.item() == pytest.approx(stored['losses'][name], rel=1e-4), name


def test_decoding():
    _, cases = load('kmax_matcher_losses')
    stored = cases['inference']['outputs']
    prediction = recorded_prediction()
    classes = 0.3 * prediction.classes[0]
    classes[torch.arange(12), torch.tensor([1, 5, 5, 2, 6, 6, 3, 7, 0, 4, 4, 1])] += 4
    classes, masks = classes.softmax(-1), (4 * prediction.masks[0]).softmax(0)
    ids, labels, _ = panoptic_in_order(
        classes, masks, things=range(4), thing_threshold=0.7, stuff_threshold=0.5, overlap_threshold=0.3
    )
    assert ids.tolist() == stored['panoptic_map']
    assert labels.tolist() == [segment['category_id'] for segment in stored['segments']]
    probe.compare(semantic_map(classes, masks), stored['semantic'])
    found = instances(classes, masks, things=range(4), threshold=0.4, limit=10)
    count = len(found['scores'])
    assert count == 4 and stored['instance_mask_areas_sorted'][4:] == [0.0]  # the authors keep a mask without a pixel
    torch.testing.assert_close(found['scores'], torch.tensor(stored['instance_scores_sorted'][:count]))
    assert found['labels'].tolist() == stored['instance_classes_sorted'][:count]
    assert found['masks'].flatten(1).sum(1).tolist() == stored['instance_mask_areas_sorted'][:count]


# properties -------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(0)
    head = KMaXDeepLab(
        feature_info=SMALL, num_classes=5, things=2, num_queries=6, depths=(1, 1, 1, 1), channels=(8, 8, 8, 8),
        decoder_depths=(1, 1), samples=64, semantic_samples=64, thing_threshold=0.0, stuff_threshold=0.0, **options
    )  # fmt: skip
    for p in head.parameters():  # branches start at zero
        p.data.add_(0.05 * torch.randn_like(p))
    return head


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
    labels = torch.tensor([o[0] for o in objects], dtype=torch.int64)
    return {'mask': mask, 'masks': masks, 'labels': labels}


HARD = {
    'objects': [target((0, 4, 4, 30, 40), (1, 20, 50, 60, 90)), target((1, 0, 0, 64, 50))],
    'no objects': [target(), target()],
    'all void': [target(stuff=255), target(stuff=255)],
    'one of them void': [target((0, 4, 4, 30, 40)), target(stuff=255)],
    'one pixel': [target((0, 5, 5, 6, 6)), target((1, 1, 2, 2, 3), (0, 63, 95, 64, 96))],
    'more objects than queries': [target(*[(i % 2, 4 * i, 8 * i, 4 * i + 4, 8 * i + 8) for i in range(9)]), target()],
}


@pytest.mark.parametrize('name', HARD)
def test_hard_targets_train(name):
    head = small(auxiliary='simple' if name == 'no objects' else 'decoder')
    losses = head.loss(maps(), HARD[name])
    total = sum(value for key, value in losses.items() if key.startswith('loss_'))
    assert all(torch.isfinite(value) and value >= 0 for value in losses.values()), losses
    total.backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    if name == 'all void':
        assert losses['loss_mask'] == 0 and losses['loss_pixel'] == 0 and losses['loss_semantic'] == 0
    if name == 'one pixel':
        assert losses['loss_dice'] > 0


def test_one_picture_trains():
    losses = small().loss(maps(1), [target((0, 4, 4, 30, 40))])
    assert all(torch.isfinite(value) for value in losses.values())


def test_matching_of_each_layer():
    torch.manual_seed(0)
    shared = small().eval().loss(maps(), HARD['objects'])
    torch.manual_seed(0)
    own = small(share_matching=False).eval().loss(maps(), HARD['objects'])
    assert own['loss_mask_aux'] != shared['loss_mask_aux']
    for key in ('loss_class', 'loss_mask', 'loss_dice'):  # those of the last prediction are the same
        torch.testing.assert_close(own[key], shared[key])


def test_order_of_objects_does_not_matter():
    head, objects = small().eval(), [(0, 4, 4, 30, 40), (1, 20, 50, 60, 90), (0, 40, 0, 60, 20)]
    one = head.loss(maps(1), [target(*objects)])
    other = head.loss(maps(1), [target(*objects[::-1])])
    for key in ('loss_class', 'loss_mask', 'loss_dice'):
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)


def test_batch_equals_singles_and_results_fit():
    head, features = small(mask_threshold=0.1, overlap_threshold=0.1).eval().double(), [f.double() for f in maps()]
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
            assert result['panoptic'].max() == len(result['segment_labels']) > 0
            assert set(result['labels'].tolist()) <= {0, 1}
            x0, y0, x1, y1 = result['boxes'].unbind(1)
            assert (x0 < x1).all() and (y0 < y1).all() and x1.max() <= originals[i][1] and y1.max() <= originals[i][0]


def test_aligned_pictures_are_sampled_and_enlarged_at_their_corners():
    head = small()
    size = (65, 97)
    segments, labels = head._sampled([target((0, 0, 0, 1, 1), size=size)], maps(1, size))
    assert segments.masks.shape[-2:] == labels.shape[-2:] == (17, 25)
    assert segments.masks[0, 0].nonzero().tolist() == [[0, 0]]  # the very pixel, not one nearby
    masks = torch.arange(17.0)[:, None].expand(1, 1, 17, 25)
    enlarged = head.reader.enlarge(masks, [size])
    assert enlarged.shape[-2:] == size
    torch.testing.assert_close(enlarged[0, 0, :, 0], torch.arange(65.0) / 4)
    middle = head.reader.enlarge(masks, [(68, 100)])
    assert middle.shape[-2:] == (68, 100) and middle[0, 0, 1, 0] == 0  # the first cell's middle is at 1.5 pixels
    # Only the width is that of aligned corners: all rows of the picture are there.
    assert head.reader.enlarge(masks, [(68, 97)]).shape[-2:] == (68, 97)
    with torch.no_grad():
        result = head.eval().predict(maps(1, (68, 97)), [(68, 97)])[0]
    assert result['mask'].shape == result['panoptic'].shape == (68, 97)
    assert small(align_corners=False).reader.enlarge(masks, [size]).shape[-2:] == (68, 100)


def test_a_segment_between_the_samples_keeps_its_cell():
    segments, _ = small()._sampled([target((0, 5, 9, 6, 10), (1, 30, 40, 60, 90))], maps(1))
    assert segments.masks[0, 0].nonzero().tolist() == [[1, 2]]
    assert segments.masks[0, 1].sum() == 8 * 12  # of the others every fourth pixel


def test_void_pixels_are_drawn_last():
    head = small()
    segments, _ = head._sampled([target((0, 4, 4, 30, 40), stuff=255)], maps(1))
    truth = kmax_loss.match(head.predictions(maps(1))[-1], segments)
    known = int((~truth.void).sum())
    drawn = kmax_loss.draw(truth, known + 5, 1.5)[0]
    assert known > 20 and len(drawn.unique()) == known + 5
    assert not truth.void[0, drawn[:known]].any() and truth.void[0, drawn[known:]].all()


def test_distances_beyond_the_table_take_its_ends():
    attention = AxialAttention2d(8, 8).height_axis
    assert attention.query_rpe(300).shape == (300, 300, 1)
    assert torch.equal(attention.query_rpe(300)[0, 254], attention.query_rpe(300)[0, 299])


def test_losses_are_float32_under_autocast():
    head = small()
    with torch.autocast('cpu', torch.bfloat16):
        losses = head.loss(maps(), HARD['objects'])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


ERRORS = [
    (
        lambda: KMaXDeepLab(feature_info=SMALL, num_classes=5, things=2, num_queries=0),
        'num_queries must be at least 1, got 0',
    ),
    (lambda: small(kinds=('axial', 'axil', 'axial', 'axial')), "kinds must be one of .* did you mean 'axial'"),
    (lambda: small(auxiliary='decode'), "auxiliary must be one of .* did you mean 'decoder'"),
    (
        lambda: KMaXDeepLab(feature_info=SMALL, num_classes=5, things=2, depths=(1, 1)),
        r'needs two maps or more and depths, channels and kinds for each, got 4 maps, depths=\(1, 1\)',
    ),
    (lambda: KMaXDeepLab(feature_info=SMALL, num_classes=5, things=7), r'things must be class ids 0\.\.4'),
    (lambda: KMaXDeepLab(feature_info=SMALL, num_classes=5, things=2, tasks=('semantics',)), 'tasks must be some of'),
    (
        lambda: KMaXDeepLab(feature_info=SMALL, num_classes=5, things=2, channels=(12, 8, 8, 8)),
        'multiple of num_heads=8, got channels=12',
    ),
    (
        lambda: KMaXDeepLab(
            feature_info=PyramidInfo([8, 12], [4, 8]),
            num_classes=5,
            things=2,
            depths=(1, 1),
            channels=(8, 8),
            kinds=('axial', 'axial'),
            decoder_depths=(1, 1),
        ),
        "auxiliary='decoder' needs four maps, got 2",
    ),
    (lambda: small().loss(maps(1), [target(stuff=7)]), r'class ids must be 0\.\.4, or 255 in mask, got 7'),
    (lambda: small().loss(maps(1), [target(size=(80, 96))]), r'larger than the padded batch \(64, 96\), got \(80'),
    (lambda: small().loss(maps(1), [target((4, 0, 0, 9, 9))]), 'labels of objects must be things'),
]


@pytest.mark.parametrize(('call', 'message'), [pytest.param(c, m, id=str(i)) for i, (c, m) in enumerate(ERRORS)])
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)
