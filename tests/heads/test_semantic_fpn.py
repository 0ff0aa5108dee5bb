"""Without this ignored pixels, padding or class weights could leak into the loss, or masks come back shifted."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.heads import PyramidInfo, SemanticFPN, losses

INFO = PyramidInfo([8, 12, 16], [4, 8, 16])


def maps(size=(50, 66), batch=2):
    torch.manual_seed(1)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(INFO.channels(), INFO.reduction())
    ]


def build(**options):
    torch.manual_seed(0)
    return SemanticFPN(feature_info=INFO, num_classes=4, channels=8, dropout=0.0, **options).eval()


def mask(size=(50, 66), seed=0):
    return torch.randint(0, 4, size, generator=torch.Generator().manual_seed(seed))


def fixed(head, logits):
    """The head with given logits at the first map's size."""
    head.forward = lambda features: logits
    return head


def test_ignored_pixels_and_padding_do_not_count():
    head, features = build(dice_weight=1.0, lovasz_weight=1.0), maps()
    whole = [{'mask': mask(seed=i)} for i in range(2)]
    cropped = [{'mask': t['mask'][:30, :40]} for t in whole]
    hidden = []
    for t in whole:
        hidden.append({'mask': t['mask'].clone()})
        hidden[-1]['mask'][30:] = hidden[-1]['mask'][:, 40:] = 255
    one, other = head.loss(features, cropped), head.loss(features, hidden)
    assert set(one) == {'loss_seg', 'loss_dice', 'loss_lovasz', 'pixel_accuracy'}
    for key in one:
        torch.testing.assert_close(one[key], other[key])
    assert (one['loss_seg'] - head.loss(features, whole)['loss_seg']).abs() > 1e-5


def test_nothing_known_is_finite():
    head = build(dice_weight=1.0, lovasz_weight=1.0, class_weight=[1, 2, 3, 4])
    terms = head.train().loss(maps(), [{'mask': torch.full((50, 66), 255)}] * 2)
    sum(v for k, v in terms.items() if k.startswith('loss_')).backward()
    assert all(v == 0 for v in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_perfect_logits_cost_nothing_and_come_back():
    truth = torch.stack([F.interpolate(mask((12, 16), i)[None, None].float(), (13, 17))[0, 0].long() for i in range(2)])
    head = fixed(build(dice_weight=1.0, lovasz_weight=1.0), 40 * F.one_hot(truth, 4).permute(0, 3, 1, 2).float())
    smooth = F.interpolate(head(None), (52, 68), mode='bilinear').argmax(1)
    terms = head.loss(maps(), [{'mask': m[:50, :66]} for m in smooth])
    assert terms['loss_seg'] < 0.2 and terms['loss_dice'] < 0.1 and terms['loss_lovasz'] < 0.1
    assert terms['pixel_accuracy'] == 1
    results = head.predict(maps(), [(50, 66), (31, 20)])
    assert torch.equal(results[0]['mask'], smooth[0, :50, :66]) and torch.equal(results[1]['mask'], smooth[1, :31, :20])
    assert results[0]['mask'].dtype == torch.int64
    shapes = [tuple(r['mask'].shape) for r in head.predict(maps(), [(50, 66), (31, 20)], [(101, 133), (62, 7)])]
    assert shapes == [(101, 133), (62, 7)]


def test_sub_pixel_logits_know_where_they_lie():
    """Channel k * 4 + 2 * row + column of the classifier is class k at that quarter of the position."""
    head, features = build(sub_pixel=2), maps()
    with torch.no_grad():
        head.conv_seg.weight.zero_()
        head.conv_seg.bias.copy_(torch.arange(16.0))
    logits = head(features)
    assert logits.shape == (2, 4, 26, 34)
    for k in range(4):
        assert logits[0, k, :2, :2].tolist() == [[4 * k, 4 * k + 1], [4 * k + 2, 4 * k + 3]]
    assert [tuple(r['mask'].shape) for r in head.predict(features, [(50, 66), (31, 20)])] == [(50, 66), (31, 20)]
    with pytest.raises(ValueError, match='sub_pixel'):
        build(sub_pixel=0)


def test_class_weight_and_average():
    features, targets = maps(), [{'mask': mask(seed=i)} for i in range(2)]
    logits = build()(features)
    labels = torch.stack([t['mask'] for t in targets])
    resized = F.interpolate(logits, (52, 68), mode='bilinear', align_corners=False)[..., :50, :66]
    weight = torch.tensor([0.1, 1, 2, 4])
    expected = F.cross_entropy(resized, labels, weight)
    torch.testing.assert_close(build(class_weight=weight.tolist()).loss(features, targets)['loss_seg'], expected)
    known = labels.clone()
    known[:, :25] = 255
    targets = [{'mask': m} for m in known]
    padded = F.pad(known, (0, 2, 0, 2), value=255)
    total = F.cross_entropy(F.interpolate(logits, (52, 68), mode='bilinear'), padded, ignore_index=255, reduction='sum')
    torch.testing.assert_close(build(average='all').loss(features, targets)['loss_seg'], total / padded.numel())
    torch.testing.assert_close(build().loss(features, targets)['loss_seg'], total / (padded != 255).sum())


def test_region_losses_are_their_measures_at_hard_predictions():
    """At one-hot probabilities Lovasz-Softmax is 1 - mean IoU and Dice 1 - mean F1, over the classes present."""
    guess, labels = torch.randint(0, 4, (2, 2, 20, 30), generator=torch.Generator().manual_seed(0))
    labels[labels == 3] = 0
    known = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    logits = 200 * F.one_hot(guess, 4).permute(0, 3, 1, 2).float()
    iou, f1 = [], []
    for c in range(3):
        a, b = (guess == c) & known, (labels == c) & known
        iou.append((a & b).sum() / (a | b).sum())
        f1.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    torch.testing.assert_close(
        losses.lovasz_softmax(logits, labels, known), 1 - torch.stack(iou).mean(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        losses.soft_dice(logits, labels, known, eps=1e-6), 1 - torch.stack(f1).mean(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: build().loss(maps(), [{'mask': torch.full((50, 66), 4)}] * 2),
            r'mask values must be 0\.\.3 or ignore_index=255, got 4',
        ),
        (
            lambda: build().loss(maps(), [{'mask': mask((53, 66))}] * 2),
            r'mask must not be larger than the padded batch \(52, 68\)',
        ),
        (lambda: build(class_weight=[1, 2]), 'class_weight needs num_classes=4 entries, got 2'),
        (lambda: build(ignore_index=0), r'ignore_index must not be a class id \(0\.\.3\), got 0'),
        (lambda: build(average='vaild'), "did you mean 'valid'"),
        (
            lambda: SemanticFPN(feature_info=PyramidInfo([8, 8], [4, 12]), num_classes=4),
            r'the first times a power of two, got \[4, 12\]',
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
