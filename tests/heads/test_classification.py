"""Without this soft labels of mixup, label smoothing or a wrong number of classes could go unnoticed."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.heads import LinearClassifier, OwnClassifier, PyramidInfo

INFO = PyramidInfo([4, 6], [8, 16])
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0], [1.0, 1.0, -2.0]])


def test_hard_and_soft_labels():
    head = OwnClassifier(num_classes=3)
    hard = head.loss(LOGITS, [{'label': 0}, {'label': torch.tensor(1)}, {'label': 2}])
    torch.testing.assert_close(hard['loss_cls'], F.cross_entropy(LOGITS, torch.arange(3)))
    assert hard['top1'].item() == pytest.approx(1 / 3)
    mixed = head.loss(
        LOGITS, [{'label': torch.tensor([1.0, 0, 0])}, {'label': 1}, {'label': torch.tensor([0, 0, 1.0])}]
    )
    torch.testing.assert_close(mixed['loss_cls'], hard['loss_cls'])
    soft = head.loss(LOGITS, [{'label': torch.tensor([0.3, 0.7, 0.0])}] * 3)
    one, other = (F.cross_entropy(LOGITS, torch.full((3,), c)) for c in (0, 1))
    torch.testing.assert_close(soft['loss_cls'], 0.3 * one + 0.7 * other)


def test_label_smoothing():
    smooth = OwnClassifier(num_classes=3, label_smoothing=0.1)
    targets = [{'label': i} for i in range(3)]
    expected = F.cross_entropy(LOGITS, torch.arange(3), label_smoothing=0.1)
    torch.testing.assert_close(smooth.loss(LOGITS, targets)['loss_cls'], expected)
    soft = [{'label': F.one_hot(torch.tensor(i), 3).float()} for i in range(3)]
    torch.testing.assert_close(smooth.loss(LOGITS, soft)['loss_cls'], expected)


def test_results():
    results = OwnClassifier(num_classes=3).predict(LOGITS, [(8, 8)] * 3)
    assert [r['label'] for r in results] == [0, 2, 0] and all(isinstance(r['label'], int) for r in results)
    torch.testing.assert_close(torch.stack([r['scores'] for r in results]), LOGITS.softmax(1))


def test_linear_classifier_reads_the_last_map():
    torch.manual_seed(0)
    head = LinearClassifier(feature_info=INFO, num_classes=3)
    features = [torch.randn(3, 4, 7, 5), torch.randn(3, 6, 4, 3)]
    logits = head(features)
    other = head([torch.randn(3, 4, 7, 5), features[1].flip(2, 3)])  # pooled: position does not matter
    torch.testing.assert_close(logits, other)
    head.loss(features, [{'label': 0}] * 3)['loss_cls'].backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    torch.testing.assert_close(head([f[1:2] for f in features])[0], logits[1])


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: OwnClassifier(num_classes=3).loss(LOGITS, [{'label': 3}] * 3),
            r'label must be in 0\.\.2, got 3; is num_classes=3',
        ),
        (
            lambda: OwnClassifier(num_classes=3).loss(LOGITS, [{'label': torch.ones(4)}] * 3),
            'soft label must have num_classes=3 entries, got 4',
        ),
        (lambda: OwnClassifier(num_classes=4)(LOGITS), r'features must be logits \(B, 4\), got \(3, 3\)'),
        (lambda: OwnClassifier(num_classes=4)([LOGITS]), r'features must be logits \(B, 4\), got list'),
        (lambda: OwnClassifier(num_classes=4, label_smoothing=1), r'label_smoothing must be in \[0, 1\), got 1'),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
