"""Without this the picture of a reduced model could show other patches than were fused."""

import numpy as np
import pytest
import torch

from densezoo.train.visualize_tokens import draw_tokens

SIDE, PATCH = 64, 16


def picture():
    """Each patch in a grey of its own."""
    numbers = torch.arange(16, dtype=torch.uint8).view(4, 4) * 10
    return numbers.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).expand(3, -1, -1).contiguous()


def panel(sheet, number, columns):
    row, column = divmod(number, columns)
    top, left = 6 + row * (SIDE + 6), 6 + column * (SIDE + 6)
    return sheet[top : top + SIDE, left : left + SIDE]


def test_fused_patches_have_their_mean_and_a_line():
    alone = torch.arange(16).view(4, 4)
    fused = alone.clone()
    fused[0, 1] = 0  # greys 0 and 10
    fused[3, 3] = -1
    sheet = draw_tokens(picture(), [alone, alone + 3, fused], PATCH, legible=1)
    columns = (sheet.shape[1] - 6) // (SIDE + 6)
    assert ((sheet.shape[0] - 6) // (SIDE + 6)) * columns >= 3
    assert (panel(sheet, 1, columns) == panel(sheet, 0, columns)).all()  # a map with other numbers is no news
    last = panel(sheet, 2, columns)
    assert (last[2:10, 2:10] == 5).all() and (last[2:10, 20:28] == 5).all()
    assert (last[2:10, 31] == 255).all() and (last[2:10, 15] == 5).all()  # a line around both, none between
    assert (last[20, 2] == 40).all()  # what was not fused stays
    assert (last[56, 56] == round(150 * 0.25)).all()


def test_small_pictures_are_enlarged_and_padding_is_left_out():
    numbers = torch.zeros(5, 5, dtype=torch.int64)
    sheet = draw_tokens(picture(), [numbers], PATCH)
    assert sheet.shape[0] == 256 + 12 and sheet.dtype == np.uint8
    with pytest.raises(ValueError, match=r'maps of 16 pixels a patch must cover \(64, 64\) pixels, got \(3, 4\)'):
        draw_tokens(picture(), [numbers[:3, :4]], PATCH)
