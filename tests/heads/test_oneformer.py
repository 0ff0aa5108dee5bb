"""Without this OneFormer could drift from the published one (head, text transformer and contrast are compared with what
the authors' code gave), its tokens from CLIP's, or a task from what it was trained on."""

import gzip

import probe
import pytest
import torch
from torch.export import Dim, export

from densezoo.heads import OneFormer, PyramidInfo
from densezoo.heads.oneformer import convert
from densezoo.heads.text import TextTransformer, Tokenizer, contrastive_loss

INPUTS = PyramidInfo([64, 128, 320, 512], [4, 8, 16, 32])
SMALL = PyramidInfo([8, 12, 16, 24], [4, 8, 16, 32])
CLASSES = ('cat', 'traffic light', 'sky', 'road', 'tree')


def load(name):
    golden = probe.load(f'heads/{name}')
    return golden, {case['name']: case for case in golden['cases']}


def test_head():
    golden, cases = load('oneformer_head_s')
    config, case = golden['config'], cases['head_256x320']
    head = OneFormer(
        feature_info=INPUTS, classes=[str(i) for i in range(config['num_classes'])], things=5,
        num_queries=config['num_queries'], channels=config['hidden'], mask_channels=config['mask_dim'],
        encoder_layers=config['enc_layers'], encoder_hidden=config['encoder_ffn'], decoder_layers=config['dec_layers'],
        class_layers=config['class_dec_layers'], hidden=config['dim_feedforward'], num_heads=config['heads'],
        text_channels=64, text_layers=1, context=4,
    ).eval()  # fmt: skip
    loaded = head.load_state_dict(convert(probe.golden_state(golden)), strict=False)
    assert not loaded.unexpected_keys
    assert {key.split('.')[0] for key in loaded.missing_keys} == {
        'text_encoder', 'text_projector', 'prompt_ctx', 'logit_scale'
    }  # fmt: skip
    task = torch.zeros(2, 77)
    task[:, :7] = torch.tensor([49406, 518, 10549, 533, 15840, 1335, 49407])
    task[1, 4] += 100
    maps = [probe.image(seed, shape) for seed, shape in zip(case['seeds'], case['shape'])]
    stored, noise = case['outputs'], case['sensitivity_1e6']
    with torch.no_grad():
        token = head.task_mlp(task / 49408)
        classes, masks, queries = head.decode(head.pixel_decoder(maps), token)
    probe.compare(token, stored['task'])
    probe.compare(queries, stored['contrastive_logits'])
    probe.compare(classes[-1], stored['pred_logits'], noise['logits'])
    probe.compare(masks[-1], stored['pred_masks'], noise['masks'])
    probe.compare(classes[0], stored['aux0_logits'], noise['logits'])
    for i in range(2):
        probe.compare(masks[i], stored[f'aux{i}_masks'], noise['masks'])


def test_text_transformer():
    golden, cases = load('oneformer_text_transformer')
    config, case = golden['config'], cases['tokens']
    encoder = TextTransformer(
        vocabulary=config['vocab_size'],
        channels=config['width'],
        num_layers=config['layers'],
        length=config['context_length'],
    ).eval()
    state = convert({f'text_encoder.{k}': v for k, v in probe.golden_state(golden).items()})
    encoder.load_state_dict({k.removeprefix('text_encoder.'): v for k, v in state.items()})
    assert sum(p.numel() for p in encoder.parameters()) == golden['params']
    with torch.no_grad():
        probe.compare(encoder(torch.tensor(case['inputs'])), case['outputs']['out'])


def test_contrast():
    _, cases = load('oneformer_contrastive_loss')
    loss = contrastive_loss(probe.image(80, [4, 6, 16]), probe.image(81, [4, 6, 16]), torch.tensor(1 / 0.07).log())
    assert loss.item() == pytest.approx(cases['loss']['outputs']['loss_contrastive'], rel=1e-5)
    large = contrastive_loss(probe.image(80, [4, 6, 16]), probe.image(81, [4, 6, 16]), torch.tensor(50.0))
    at_limit = contrastive_loss(probe.image(80, [4, 6, 16]), probe.image(81, [4, 6, 16]), torch.tensor(100.0).log())
    assert large.item() == pytest.approx(at_limit.item())


# tokens -----------------------------------------------------------------------------------------------


def test_bytes_without_a_table():
    tokens = Tokenizer(length=8)
    assert tokens.size == 514 and (tokens.start, tokens.end) == (512, 513)
    # CLIP's numbers: '!' is 0, 'a' 64; 256 more at the end of a word.
    assert tokens.encode('A  cat!') == [64 + 256, 66, 64, 83 + 256, 256]
    assert tokens(['a', 'a cat that is cut']).tolist() == [
        [512, 320, 513, 0, 0, 0, 0, 0],
        [512, 320, 66, 64, 339, 83, 71, 513],
    ]
    assert len(tokens.encode('é')) == 2 and tokens.encode('&amp;') == tokens.encode('&')
    different = {tuple(tokens.encode(bytes([i]).decode('latin1'))) for i in range(33, 127) if not 65 <= i <= 90}
    assert len(different) == 94 - 26


@pytest.mark.parametrize('zipped', [False, True])
def test_merges_are_applied_in_their_order(tmp_path, zipped):
    text = b'#version: 0.2\nt h\nth e</w>\nc a\na t</w>\n'
    path = tmp_path / ('merges.txt.gz' if zipped else 'merges.txt')
    path.write_bytes(gzip.compress(text) if zipped else text)
    tokens = Tokenizer(path)
    assert tokens.size == 514 + 4 and tokens.start == 516
    assert tokens.encode('the') == [513]
    assert tokens.encode('cat') == [514, 83 + 256]  # 'c a' comes before 'a t</w>'
    assert tokens.encode('that') == [512, 515]
    assert tokens.encode('thethe') == [512, 68, 513]  # 'e' inside a word is not the 'e' that ends one


# properties -------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(0)
    settings = dict(
        feature_info=SMALL, classes=CLASSES, things=2, num_queries=8, channels=16, mask_channels=8, encoder_layers=1,
        encoder_hidden=16, decoder_layers=2, class_layers=1, hidden=16, num_heads=4, loss_points=50, text_channels=64,
        text_layers=1, context=2, score_threshold=0.0, overlap_threshold=0.0, task_scale=1 / 514,
    )  # fmt: skip
    return OneFormer(**{**settings, **options})


def maps(batch=2, size=(64, 96)):
    torch.manual_seed(1)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(SMALL.channels(), SMALL.reduction())
    ]


def target(*objects, size=(64, 96), stuff=3):
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
    'more objects than queries': [target(*[(i % 2, 4 * i, 8 * i, 4 * i + 4, 8 * i + 8) for i in range(11)]), target()],
}


@pytest.mark.parametrize('name', HARD)
def test_hard_targets_train(name):
    head = small()
    losses = head.loss(maps(), HARD[name])
    assert all(torch.isfinite(value) and value >= 0 for value in losses.values()), losses
    sum(losses.values()).backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


def test_training_draws_every_task_from_the_seed(monkeypatch):
    head, seen = small(), []
    gather = head.gather
    monkeypatch.setattr(
        head, 'gather', lambda targets, padded, kinds: seen.append(kinds) or gather(targets, padded, kinds)
    )
    features = maps()
    for seed in (0, 1, 2, 3, 0):
        torch.manual_seed(seed)
        head.loss(features, HARD['objects'])
    assert {kind for kinds in seen for kind in kinds} == {'panoptic', 'instance', 'semantic'}
    assert seen[0] == seen[-1]


def test_texts_name_the_segments():
    head = small().eval()
    targets = [target((1, 4, 4, 30, 40), (0, 20, 50, 60, 90), (1, 40, 0, 60, 20))] * 3
    kinds = ['panoptic', 'instance', 'semantic']
    segments = head.gather(targets, (64, 96), kinds)
    read = []
    tokenizer = head.tokenizer
    head.tokenizer = lambda texts: read.append(texts) or tokenizer(texts)
    with torch.no_grad():
        vectors = head.texts(segments, kinds)
        expected = [
            ['cat', 'traffic light', 'traffic light', 'road', None, None],
            ['cat', 'traffic light', 'traffic light', None, None, None],
            ['cat', 'traffic light', 'road', None, None, None],
        ]
        for row, names, own in zip(vectors, expected, ('a panoptic photo', 'an instance photo', 'a semantic photo')):
            texts = [own if name is None else f'a photo with a {name}' for name in names]
            alone = head.text_projector(head.text_encoder(tokenizer(texts)))
            torch.testing.assert_close(row[:6], alone)
            torch.testing.assert_close(row[6:], head.prompt_ctx.weight)
    assert len(read[0]) == len(set(read[0])) == 6  # each different text once


def test_text_behind_the_end_is_not_read():
    encoder, tokens = TextTransformer(vocabulary=514, channels=64, num_layers=2).eval(), Tokenizer()
    short, long = tokens(['a cat']), tokens(['a cat', 'a very long text that goes on and on'])
    with torch.no_grad():
        torch.testing.assert_close(encoder(short)[0], encoder(long)[0])


def test_each_task_is_answered_by_its_own_run():
    head, features = small().eval(), maps()
    with torch.no_grad():
        classes, masks = head(features)
        assert classes.shape == (2, 3, 8, 6) and masks.shape == (2, 3, 8, 16, 24)
        assert not torch.allclose(classes[:, 0], classes[:, 2])  # the task is heard
        together = head.predict(features, [(64, 96)] * 2)
        for task, keys in (
            ('panoptic', {'panoptic', 'segment_labels', 'segment_scores'}),
            ('instance', {'boxes', 'labels', 'scores', 'masks'}),
            ('semantic', {'mask'}),
        ):
            alone = small(tasks=(task,)).eval().predict(features, [(64, 96)] * 2)
            assert [result.keys() for result in alone] == [keys] * 2
            for result, both in zip(alone, together):
                for key in keys:
                    torch.testing.assert_close(result[key], both[key])


def test_a_head_with_seeds():
    """Batched equals single, every parameter learns, and the graph of any batch computes the same."""
    head, features = small(num_seeds=5).eval(), maps()
    with torch.no_grad():
        classes, masks = head(features)
        assert classes.shape == (2, 3, 8 + 5, 6) and masks.shape == (2, 3, 8 + 5, 16, 24)
        single = head([f[1:] for f in features])
    torch.testing.assert_close(single[0], classes[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single[1], masks[1:], rtol=1e-4, atol=1e-4)
    program = export(head, (features,), dynamic_shapes=([{0: Dim('batch', min=2, max=16)} for _ in features],)).module()
    for ours, theirs in zip(program([torch.cat([f, f]) for f in features]), (classes, masks), strict=True):
        torch.testing.assert_close(ours, torch.cat([theirs, theirs]), rtol=1e-4, atol=1e-4)
    losses = head.train().loss(features, HARD['objects'])
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert head.predictor.seeds.rate.weight.grad.abs().sum() > 0


def test_losses_are_float32_under_autocast():
    head = small()
    with torch.autocast('cpu', torch.bfloat16):
        losses = head.loss(maps(), HARD['objects'])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


ERRORS = [
    (lambda: small(context=8), 'context must be fewer than num_queries=8, got 8'),
    (lambda: small(text_channels=80), 'must be a multiple of 64, got 80'),
    (lambda: small(length=2), 'length must be at least 3'),
    (lambda: small(tasks=()), r'tasks must be some of .*got \(\)'),
    (lambda: Tokenizer('/nowhere/merges.txt'), 'merges: no file /nowhere/merges.txt; CLIP publishes'),
]


@pytest.mark.parametrize(('call', 'message'), [pytest.param(c, m, id=str(i)) for i, (c, m) in enumerate(ERRORS)])
def test_errors_are_one_line(call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_a_table_that_is_none(tmp_path):
    (tmp_path / 'merges.txt').write_text('#version\na b c\n')
    with pytest.raises(ValueError, match=r"a line of .*merges\.txt must be two parts, got 'a b c'"):
        Tokenizer(tmp_path / 'merges.txt')
