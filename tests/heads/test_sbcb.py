"""Without this SBCB's targets could miss a side of a boundary or draw one around what is unknown, or the auxiliary head
could reach predictions and exported graphs."""

import pytest
import tiny_tasks as tasks
import torch
import torch.nn.functional as F
from torch.export import export

from densezoo.heads import FCN, FPN, SBCB, PyramidInfo, SemanticFPN
from densezoo.heads.sbcb import boundaries, boundary_loss
from densezoo.train import Segmentor
from densezoo.train.deployable import Deployable

INFO = PyramidInfo([8, 12, 16], [4, 8, 16])
SIZE = (50, 66)


def maps(batch=2):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, c, -(-SIZE[0] // s), -(-SIZE[1] // s), generator=generator)
        for c, s in zip(INFO.channels(), INFO.reduction())
    ]


def build(**options):
    torch.manual_seed(0)
    return SBCB(feature_info=INFO, num_classes=4, **options)


def literal(labels, classes, radius):
    """Every pair of known pixels within the radius, one by one."""
    edges = torch.zeros(len(labels), classes, *labels.shape[1:], dtype=torch.bool)
    known = labels != 255
    for b, y, x in known.nonzero().tolist():
        for v, u in known[b].nonzero().tolist():
            if (v - y) ** 2 + (u - x) ** 2 <= radius**2 and labels[b, y, x] != labels[b, v, u]:
                edges[b, labels[b, y, x], y, x] = edges[b, labels[b, v, u], y, x] = True
    return edges


@pytest.mark.parametrize('radius', [1, 2, 3])
def test_boundaries_are_those_of_every_pair_of_pixels(radius):
    generator = torch.Generator().manual_seed(radius)
    labels = F.interpolate(torch.randint(0, 3, (2, 1, 3, 4), generator=generator).float(), size=(9, 11)).long()[:, 0]
    labels[0, :3, 2:9] = 255
    labels[1, 4, 5] = 2
    edges, known = boundaries(labels, 3, radius=radius, ignore_index=255)
    assert torch.equal(edges, literal(labels, 3, radius)) and torch.equal(known, labels != 255)
    assert 0 < edges.float().mean() < 1


def test_nothing_unknown_and_no_rim_is_a_boundary():
    labels = torch.zeros(3, 8, 8, dtype=torch.int64)
    labels[1, 2:5] = 255
    labels[2] = 255
    edges, known = boundaries(labels, 2, radius=2, ignore_index=255)
    assert not edges.any() and known.sum() == 64 + 40
    labels[0, 3, 3] = 1  # one pixel: it, and a disc around it, for both classes
    edges = boundaries(labels, 2, radius=2, ignore_index=255)[0]
    assert edges[0].sum((1, 2)).tolist() == [13, 13] and torch.equal(edges[0, 0], edges[0, 1])


def test_classes_shifted_and_ignored_value_inside_the_range_of_bytes():
    labels = torch.tensor([[[0, 0, -1, 1, 1]]])
    edges, known = boundaries(labels, 2, radius=1, ignore_index=-1)
    assert not edges.any() and known.sum() == 4
    assert boundaries(labels, 2, radius=3, ignore_index=-1)[0].all(1).sum() == 4  # across the unknown pixel, but not it


def test_loss_by_hand_and_weights():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5]).reshape(1, 1, 2, 2)
    edges = torch.tensor([True, False, False, True]).reshape(1, 1, 2, 2)
    known = torch.tensor([True, True, True, False]).reshape(1, 2, 2)
    # one boundary of three known pixels: it weighs (3 - 1) / 1
    terms = [2 * F.softplus(torch.tensor(-0.3)), F.softplus(torch.tensor(-1.0)), F.softplus(torch.tensor(2.0))]
    torch.testing.assert_close(boundary_loss(logits, edges, known), sum(terms) / 3)
    assert boundary_loss(logits, edges, known & False) == 0
    head, targets = build(), [{'mask': torch.randint(0, 4, SIZE)} for _ in range(2)]
    once = build(loss_weight=1.0).loss(maps(), targets)
    five = head.loss(maps(), targets)
    assert five.keys() == {'loss_fused', 'loss_last'}
    for key, value in five.items():
        torch.testing.assert_close(value, 5 * once[key])


def test_perfect_logits_cost_nothing():
    labels = torch.randint(0, 4, (2, 6, 7), generator=torch.Generator().manual_seed(0))
    edges, known = boundaries(labels, 4, radius=1, ignore_index=255)
    assert boundary_loss(100 * (edges.float() - 0.5), edges, known) < 1e-6
    assert boundary_loss(-100 * (edges.float() - 0.5), edges, known) > 10


@pytest.mark.parametrize('stride', [1, 4, 7])
def test_any_stride_and_ugly_masks_are_trained_through(stride):
    for mask in (torch.randint(0, 4, SIZE), torch.full(SIZE, 255), torch.full((20, 30), 3)):
        head = build(stride=stride).train()
        fused, last = head(maps())
        assert fused.shape == last.shape == (2, 4, -(-52 // stride), -(-68 // stride))
        losses = head.loss(maps(), [{'mask': mask}, {'mask': mask}])
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@torch.no_grad()
def test_fused_logits_are_a_class_and_the_shared_ones():
    head = build().eval()
    head.fuse.weight.copy_(torch.arange(12.0).reshape(4, 3, 1, 1))
    fused, last = head(maps())
    shared = [side(x, (52, 68)) for side, x in zip(head.sides, maps())]
    for k in range(4):
        expected = 3 * k * last[:, k] + (3 * k + 1) * shared[0][:, 0] + (3 * k + 2) * shared[1][:, 0]
        torch.testing.assert_close(fused[:, k], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- in a segmentor


def segmentor(**options):
    torch.manual_seed(0)
    return Segmentor(backbone=tasks.PYRAMID, neck={'type': FPN, 'out_channels': 16}, preprocess=tasks.PIXELS,
                     head={'type': SemanticFPN, 'num_classes': 4, 'channels': 16}, **options)  # fmt: skip


AUXILIARY = {
    'boundary': {'type': SBCB, 'num_classes': 4, 'levels': (0, 1, 3)},
    'fcn': {'type': FCN, 'num_classes': 4, 'channels': 8, 'loss_weight': 0.4},
}


def batch(task):
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))] * 2
    mask = torch.zeros(64, 64, dtype=torch.int64)
    mask[10:40, 20:50] = 2
    return task.data_preprocessor({'images': images, 'targets': [{'mask': mask}] * 2}, True)


def test_auxiliary_heads_teach_the_backbone_under_their_names():
    task, plain = segmentor(auxiliary=AUXILIARY).train(), segmentor().train()
    losses = task(**batch(task), mode='loss')
    assert losses.keys() == plain(**batch(plain), mode='loss').keys() | {
        'loss_boundary_fused', 'loss_boundary_last', 'loss_fcn_seg', 'fcn_pixel_accuracy',
    }  # fmt: skip
    total, _ = task.parse_losses(losses)
    terms = [value for key, value in losses.items() if key.startswith('loss')]
    torch.testing.assert_close(total, torch.stack(terms).sum())
    (losses['loss_boundary_fused'] + losses['loss_fcn_seg']).backward()
    assert task.backbone.stages[0][0].mlp.fc1.weight.grad.abs().sum() > 0
    assert task.neck.inner_blocks[0][0].weight.grad is None and task.head.conv_seg.weight.grad is None


def test_predictions_and_exported_graphs_know_nothing_of_it():
    with_it, without = segmentor(auxiliary=AUXILIARY).eval(), segmentor().eval()
    left = with_it.load_state_dict(without.state_dict(), strict=False)
    assert not left.unexpected_keys and all(key.startswith('auxiliary.') for key in left.missing_keys)
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    forms = [Deployable(task).eval() for task in (with_it, without)]
    graphs = [export(form, (x,)) for form in forms]
    assert str(graphs[0].graph) == str(graphs[1].graph) and len(graphs[0].graph.nodes) > 50
    assert graphs[0].state_dict.keys() == graphs[1].state_dict.keys()
    with torch.no_grad():
        assert torch.equal(forms[0](x), forms[1](x)) and torch.equal(with_it(x), without(x))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'levels': (0,)}, r'levels must be two or more rising indices of the 3 maps, got \(0,\)'),
        ({'levels': (1, 0)}, r'levels must be two or more rising indices of the 3 maps, got \(1, 0\)'),
        ({'levels': (0, 3)}, r'levels must be two or more rising indices of the 3 maps, got \(0, 3\)'),
        ({'radius': 0}, 'radius must be at least 1, got 0'),
        ({'stride': 0}, 'stride must be at least 1, got 0'),
        ({'ignore_index': 2}, r'ignore_index must not be a class id \(0\.\.3\), got 2'),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_masks_are_named():
    with pytest.raises(ValueError, match=r'mask values must be 0\.\.3 or ignore_index=255, got 4'):
        build().loss(maps(), [{'mask': torch.full(SIZE, 4)}] * 2)
