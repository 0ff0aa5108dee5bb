"""Without this the same target could mean one thing to a universal head and another to the evaluator: the segments that
a head learns, put together again, must be the panoptic map that it is measured against."""

import pytest
import torch

from densezoo.heads.segments import panoptic_map, segments

THINGS = (1, 3)


def target(**changes):
    """Two touching objects of class 1, a crowd of class 3, stuff 0 and 2, unknown pixels."""
    mask = torch.zeros(8, 10, dtype=torch.int64)
    mask[4:] = 2
    masks = torch.zeros(3, 8, 10, dtype=torch.bool)
    masks[0, 1:3, 1:4], masks[1, 1:3, 4:6], masks[2, 5:7, 5:9] = True, True, True
    mask[masks[0] | masks[1]], mask[masks[2]] = 1, 3
    mask[:, 9] = 255
    labels = torch.tensor([1, 1, 3])
    return {'mask': mask, 'masks': masks, 'labels': labels, 'iscrowd': torch.tensor([0, 0, 1])} | changes


def test_kinds_of_segments():
    labels, masks = segments(target(), things=THINGS)
    assert labels.tolist() == [1, 1, 0, 2] and masks.dtype == torch.bool  # the crowd is no target
    assert torch.equal(masks[:2], target()['masks'][:2]) and masks[3].sum() == 4 * 9 - 8
    assert segments(target(), things=THINGS, kind='instance')[0].tolist() == [1, 1]
    labels, masks = segments(target(), things=THINGS, kind='semantic')
    assert labels.tolist() == [0, 1, 2, 3] and masks[1].sum() == 10 and masks.sum() == 8 * 9


def test_segments_put_together_are_the_panoptic_map():
    full = panoptic_map(target(), things=THINGS)
    assert full.labels.tolist() == [1, 1, 3, 0, 2] and full.crowd.tolist() == [False, False, True, False, False]
    labels, masks = segments(target(), things=THINGS)
    single = (~full.crowd).nonzero()[:, 0]
    assert torch.equal(full.labels[single], labels)
    assert torch.equal(torch.stack([full.ids == n + 1 for n in single]), masks)
    assert (full.ids[:, 9] == 0).all() and (full.ids == 0).sum() == 8


def test_hidden_objects_and_things_without_an_object():
    covered = target()
    covered['masks'][1] = covered['masks'][0]  # the later one counts
    full = panoptic_map(covered, things=THINGS)
    assert full.labels.tolist() == [1, 3, 0, 2] and (full.ids == 1).sum() == 6
    assert (full.ids[1:3, 4:6] == 0).all()  # pixels of a thing that no object claims
    gone = target(masks=target()['masks'] & torch.tensor([True, False, True])[:, None, None])
    assert segments(gone, things=THINGS, kind='instance')[0].tolist() == [1]


def test_an_object_keeps_its_pixels_where_the_map_names_stuff():
    disputed = target()
    disputed['mask'][1, 1] = 0
    assert panoptic_map(disputed, things=THINGS).ids[1, 1] == 1


@pytest.mark.parametrize('kind', ['panoptic', 'instance', 'semantic'])
def test_empty_targets(kind):
    empty = {
        'mask': torch.full((5, 6), 255),
        'masks': torch.zeros(0, 5, 6, dtype=torch.bool),
        'labels': torch.zeros(0, dtype=torch.int64),
    }
    labels, masks = segments(empty, things=THINGS, kind=kind)
    assert labels.shape == (0,) and labels.dtype == torch.int64 and masks.shape == (0, 5, 6)
    full = panoptic_map(empty, things=THINGS)
    assert not full.ids.any() and full.ids.dtype == torch.int64 and len(full.labels) == 0
    one = empty | {'mask': torch.full((5, 6), 2)}
    assert panoptic_map(one, things=THINGS).ids.eq(1).all()


def test_errors():
    with pytest.raises(ValueError, match=r'labels of objects must be things \(1, 3\), got 2'):
        segments(target(labels=torch.tensor([1, 2, 3])), things=THINGS)
    with pytest.raises(ValueError, match=r'masks must be \(N, H, W\) .* \(8, 10\), got \(3, 8, 10\) for 2 labels'):
        panoptic_map(target(labels=torch.tensor([1, 3])), things=THINGS)
    with pytest.raises(ValueError, match=r"kind must be one of .* did you mean 'panoptic'"):
        segments(target(), things=THINGS, kind='panotic')
