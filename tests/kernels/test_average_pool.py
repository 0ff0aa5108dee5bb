"""Pooling to bins: torch's values, also in files that take other sizes than the traced one."""

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densezoo.deploy import export_onnx
from densezoo.deploy.onnx import count_operators
from densezoo.kernels import average_pool
from densezoo.kernels.average_pool import average_pool_matrices

SIZES = ((1, 1), (2, 5), (6, 7), (13, 29), (12, 18))


def maps(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('bins', [1, 2, 3, 6])
@pytest.mark.parametrize('function', [average_pool, average_pool_matrices])
def test_equals_adaptive_pooling(function, bins):
    for size in SIZES:
        x = maps(size)
        torch.testing.assert_close(function(x, bins), F.adaptive_avg_pool2d(x, bins))


class Pool(nn.Module):
    """Of every sixteenth row and column: maps of fewer rows than bins among them."""

    def forward(self, x):
        return average_pool(x[..., ::16, ::16], 7)


@pytest.mark.parametrize('traced', [(64, 96), (112, 336)])
def test_files_take_other_sizes(tmp_path, traced):
    path = export_onnx(Pool(), maps(traced), tmp_path / 'pool.onnx', dynamic_size=True)
    session = onnxruntime.InferenceSession(path)
    for size in ((197, 133), (36, 300), traced):
        x = maps(size, 3)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {'images': x.numpy()})[0]), Pool()(x))


def test_files_of_a_size_that_the_bins_divide_hold_one_pooling(tmp_path):
    operators = count_operators(export_onnx(Pool(), maps((112, 336)), tmp_path / 'pool.onnx'))
    assert operators.keys() <= {'Slice', 'AveragePool', 'GlobalAveragePool'} and len(operators) > 1, operators
