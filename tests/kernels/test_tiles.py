"""Without this large pictures could show seams, come back shifted, or need memory that grows with them."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.kernels import run_tiles

# height, width, tile, overlap: ragged ones first
CASES = [(37, 61, 16, 8), (16, 16, 16, 4), (5, 90, 20, 10), (33, 17, 32, 16), (64, 64, 24, 12), (9, 9, 40, None)]


def blur(images):
    """Looks one pixel far and sees zeros outside."""
    return F.conv2d(images, torch.full((3, 1, 3, 3), 1 / 9), padding=1, groups=3)


@pytest.mark.parametrize(('height', 'width', 'tile', 'overlap'), CASES)
@pytest.mark.parametrize('batch', [1, 3])
def test_a_local_function_gives_the_whole_picture(height, width, tile, overlap, batch):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    seen = []

    def function(crops):
        seen.append(tuple(crops.shape))
        return blur(crops)

    out = run_tiles(function, images, tile=tile, overlap=overlap, batch=batch)
    torch.testing.assert_close(out, blur(images))
    assert {shape[2:] for shape in seen} == {(min(tile, height), min(tile, width))}  # never more than a tile
    assert max(shape[0] for shape in seen) <= batch


def test_larger_results_and_other_channels():
    images = torch.rand(1, 3, 30, 50)
    grow = lambda x: F.interpolate(x[:, :1], scale_factor=2, mode='nearest')  # noqa: E731
    torch.testing.assert_close(run_tiles(grow, images, tile=16), grow(images))


def test_without_overlap_tiles_stand_side_by_side():
    out = run_tiles(lambda x: x - x.mean(), torch.rand(1, 1, 8, 12), tile=4, overlap=0)
    assert out.view(1, 1, 2, 4, 3, 4).mean((3, 5)).abs().max() < 1e-6


def test_tiles_fade_into_each_other():
    """Along a row that is covered by two tiles, of which one is white and one is black, values fall steadily."""
    values = iter([1.0, 0.0])
    row = run_tiles(lambda x: torch.full_like(x, next(values)), torch.zeros(1, 1, 4, 24), tile=16, overlap=8)[0, 0, 0]
    assert row[:10].eq(1).all() and row[14:].eq(0).all()
    assert (row[10:14].diff() < 0).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'tile': 8, 'smallest': 16}, 'tile must be at least 16 pixels, the least this model works on, got 8'),
        ({'tile': 0}, 'tile must be at least 1 pixels'),
        ({'tile': 8, 'overlap': 5}, r'overlap must be in 0\.\.4, at most half of tile=8, got 5'),
        ({'tile': 8, 'batch': 0}, 'batch must be at least 1, got 0'),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        run_tiles(blur, torch.rand(1, 3, 20, 20), **options)
    with pytest.raises(ValueError, match=r'images must be \(B, C, H, W\), got \(3, 20, 20\)'):
        run_tiles(blur, torch.rand(3, 20, 20), tile=8)
    with pytest.raises(ValueError, match=r'function must return \(1, C, s 8, s 8\) with a whole s, got'):
        run_tiles(lambda x: x[..., :-1], torch.rand(1, 3, 20, 20), tile=8)
