"""Without this attention could look up the wrong offset: trained models would fit it, published weights would not."""

import pytest
import torch

from densezoo.backbones.layers.relative_position import RelativePositionBias


@pytest.mark.parametrize('window', [1, 7, (2, 3), (4, 1)])
def test_each_pair_of_positions_gets_its_own_offset(window):
    bias = RelativePositionBias(window, heads=2)
    height, width = bias.window
    offsets = [(down, right) for down in range(1 - height, height) for right in range(1 - width, width)]
    assert bias.table.shape == (len(offsets), 2)
    with torch.no_grad():  # the table holds the offsets themselves
        bias.table.copy_(torch.tensor(offsets))
    positions = [(row, column) for row in range(height) for column in range(width)]
    down, right = bias().tolist()
    for i, query in enumerate(positions):
        for j, key in enumerate(positions):
            assert (down[i][j], right[i][j]) == (query[0] - key[0], query[1] - key[1])


def test_gradient_counts_the_pairs_of_an_offset():
    bias = RelativePositionBias(3, heads=1)
    bias().sum().backward()
    assert bias.table.grad.reshape(5, 5)[2, 2] == 9 and bias.table.grad.reshape(5, 5)[0, 0] == 1


def test_index_is_not_saved():
    assert list(RelativePositionBias(7, 3).state_dict()) == ['table']
