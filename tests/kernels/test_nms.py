"""Without this an exported detector could keep doubles or lose objects that the trained one finds."""

import pytest
import torch
from torchvision.ops import batched_nms, nms

from densezoo.kernels import apart, suppress, suppress_by_products


def crowd(batch, count, seed=0):
    """Boxes around a few centres, so that most of them overlap others; some scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(0, 4, (batch, count, 2), generator=generator) * 20.0
    corner = centre + torch.rand(batch, count, 2, generator=generator) * 12
    boxes = torch.cat([corner, corner + 5 + torch.rand(batch, count, 2, generator=generator) * 20], -1)
    return boxes, (torch.rand(batch, count, generator=generator) * 50).round() / 50


def by_torchvision(boxes, scores, threshold):
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for row, picture, score in zip(keep, boxes, scores, strict=True):
        order = score.argsort(descending=True, stable=True)  # torchvision leaves open which of equal scores comes first
        strictly = torch.arange(len(score), 0, -1.0)
        row[order[nms(picture[order], strictly, threshold)]] = True
    return keep


@pytest.mark.parametrize(('batch', 'count'), [(1, 1), (2, 2), (3, 40), (2, 150)])
@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.7])
def test_both_forms_are_greedy_suppression(batch, count, threshold):
    boxes, scores = crowd(batch, count)
    expected = by_torchvision(boxes, scores, threshold)
    assert torch.equal(suppress(boxes, scores, threshold), expected)
    assert torch.equal(suppress_by_products(boxes, scores, threshold, rounds=24), expected)
    assert count < 40 or not expected.all()


def test_few_rounds_keep_too_many_but_lose_none():
    """A row of boxes, each of which overlaps the next alone: every second one stays."""
    left = torch.arange(12.0) * 6
    boxes = torch.stack([left, torch.zeros(12), left + 10, torch.ones(12)], -1)[None]
    scores = torch.arange(12.0, 0, -1)[None]
    exact = suppress(boxes, scores, 0.2)
    assert exact[0].tolist() == [True, False] * 6
    rough = suppress_by_products(boxes, scores, 0.2, rounds=4)
    assert not (exact & ~rough).any() and rough.sum() > exact.sum()
    assert torch.equal(suppress_by_products(boxes, scores, 0.2, rounds=12), exact)


def test_groups_do_not_see_each_other():
    boxes, scores = crowd(1, 60)
    scores = torch.rand(1, 60, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60)[None] % 3
    kept = suppress(apart(boxes, labels), scores, 0.4)[0]
    assert sorted(batched_nms(boxes[0], scores[0], labels[0], 0.4).tolist()) == kept.nonzero()[:, 0].tolist()


def test_errors():
    boxes, scores = crowd(2, 5)
    for call in (suppress, suppress_by_products):
        with pytest.raises(ValueError, match=r'boxes must be \(B, M, 4\) and scores \(B, M\), got .*\(2, 4\)'):
            call(boxes, scores[:, :4], 0.5)
    with pytest.raises(ValueError, match='rounds must be an even number from 2 on, got rounds=3'):
        suppress_by_products(boxes, scores, 0.5, rounds=3)
