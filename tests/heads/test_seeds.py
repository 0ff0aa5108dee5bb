"""Without this seeds could start from wrong cells, carry another position, or not lose their masks to distance."""

import pytest
import torch

from densezoo.heads.seeds import SeedQueries
from densezoo.heads.transformer import sine_positions


def module(number=2, classes=(1,), channels=8):
    torch.manual_seed(0)
    seeds = SeedQueries(channels=channels, number=number, classes=classes)
    torch.nn.init.eye_(seeds.proj.weight)
    return seeds


def positions(cells):
    return sine_positions(*cells.shape[2:], 8, None, cells.device)


def by_channel(query):
    """Logits (B, N, 3) that the first channels say."""
    return query[..., :3]


def bump(places, shape=(4, 6)):
    """Cells (1, 8, h, w) whose channel 1 is high at these places, less so around them."""
    cells = 0.1 * torch.randn(1, 8, *shape, generator=torch.Generator().manual_seed(0))
    for height, (row, column) in places.items():
        cells[0, 1, row, column] += height
    return cells


def test_seeds_are_local_maxima_of_their_classes():
    """The cell beside the highest is higher than the second maximum, and is no seed."""
    cells = bump({9: (0, 0), 6: (0, 1), 3: (3, 4)})
    found = module()(cells, positions(cells), (8, 12), by_channel)
    torch.testing.assert_close(found.place[0], positions(cells)[0, [0, 3 * 6 + 4]])
    torch.testing.assert_close(found.query[0], module().norm(module().proj(cells[0, :, [0, 3], [0, 4]].T)))
    other = module(classes=(0, 2))(cells, positions(cells), (8, 12), by_channel)
    assert not torch.equal(other.place, found.place)


def test_distances_are_in_cells():
    cells = bump({9: (2, 5)})
    found = module(number=1)(cells, positions(cells), (8, 12), by_channel)
    rows, columns = found.away
    assert rows[0, 0].tolist() == pytest.approx([(0.5 * (i + 0.5) - 2.5) ** 2 for i in range(8)])
    assert columns[0, 0].argmin() in (10, 11) and columns[0, 0, 0] == pytest.approx(5.25**2)


def test_masks_fade_at_the_rate_of_their_query():
    seeds, cells = module(number=3), bump({9: (0, 0), 5: (3, 3), 4: (1, 5)})
    found = seeds(cells, positions(cells), (8, 12), by_channel)
    masks = torch.randn(1, 2 + 3, 8, 12)
    query = torch.cat([torch.randn(1, 2, 8), found.query], 1)
    rows, columns = found.away
    distance = rows[..., None] + columns[:, :, None]
    with torch.no_grad():
        near = seeds.keep_near(masks, query, found)
        assert torch.equal(near[:, :2], masks[:, :2])  # learnt queries are anywhere
        rate = (masks - near)[:, 2:] / distance
        assert rate.min() > 0 and (rate.amax((2, 3)) - rate.amin((2, 3))).max() < 1e-4
        seeds.rate.bias.fill_(-100.0)
        torch.testing.assert_close(seeds.keep_near(masks, query, found), masks)


def test_fewer_cells_than_seeds_and_what_is_told():
    seeds, told = module(number=9), torch.ones(2, 1, 8)
    cells = torch.randn(2, 8, 2, 3)
    found = seeds(cells, positions(cells), (4, 6), by_channel, told)
    assert found.query.shape == found.place.shape == (2, 6, 8)
    without = seeds(cells, positions(cells), (4, 6), by_channel)
    assert {tuple(row.tolist()) for row in without.place[0]} == {tuple(row.tolist()) for row in found.place[0]}
    torch.testing.assert_close(found.query.sum(1), without.query.sum(1) + 6)
