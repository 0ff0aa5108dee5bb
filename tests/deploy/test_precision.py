"""Without this half precision could overflow unseen, or int8 lose more than was allowed."""

import onnx
import pytest
import torch
from torch import nn

from densezoo.deploy import Half, OnnxModel, check_onnx, export_onnx, out_of_range, quantize, quantize_within
from densezoo.deploy.onnx import count_operators
from densezoo.deploy.quantize import quantizable, sensitivity


class Loud(nn.Module):
    """Its middle layer leaves float16's range; its output does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.loud = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        self.last = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.loud[0].weight.mul_(1e6)
            self.loud[1].weight.mul_(1e-6)

    def forward(self, x):
        return self.last(self.loud(self.first(x)))


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_layers_that_overflow_are_found_and_kept(tmp_path):
    model = Loud().eval()
    keep = out_of_range(model, [X])
    assert list(keep) == ['loud.0'] and keep['loud.0'] > 65504
    with torch.no_grad():
        assert not Half(model, 'fp16')(X).isfinite().all()
        # its neighbour takes what is out of range, so both stay
        half = Half(model, 'fp16', keep=['loud'])
        torch.testing.assert_close(half(X), model(X), rtol=0.02, atol=0.02)
    assert half.model.first.weight.dtype == torch.float16 and half.model.loud[0].weight.dtype == torch.float32
    assert model.first.weight.dtype == torch.float32
    (row,) = check_onnx(model, export_onnx(half, X, tmp_path / 'half.onnx'), X)
    assert row.cosine > 0.999
    assert out_of_range(model, [X], precision='bf16') == {}


@pytest.mark.parametrize(('precision', 'kind'), [('fp16', 'FLOAT16'), ('bf16', 'BFLOAT16')])
def test_graphs_are_strongly_typed(tiny, tmp_path, precision, kind):
    model, images = tiny
    path = export_onnx(Half(model, precision), images, tmp_path / 'half.onnx')
    graph = onnx.load(path).graph
    types = {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if len(t.dims) > 1}
    assert types - {'INT64'} == {kind}
    assert {t.type.tensor_type.elem_type for t in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    if precision == 'fp16':  # onnxruntime has no bfloat16 on CPUs
        assert check_onnx(model, path, images)[0].cosine > 0.999


def test_int8_has_pairs_where_tensorrt_wants_them(tiny, tiny_onnx, tmp_path):
    model, images = tiny
    path = quantize(tiny_onnx, tmp_path / 'int8.onnx', [images])
    counts, nodes = count_operators(path), quantizable(tiny_onnx)
    assert counts['QuantizeLinear'] == len(nodes) and counts['DequantizeLinear'] == 2 * len(nodes)
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith('zero_point'):
            assert not onnx.numpy_helper.to_array(tensor).any()  # symmetric
    assert check_onnx(model, path, images)[0].cosine > 0.98
    assert OnnxModel(path).metadata['precision'] == 'int8'


def test_the_most_sensitive_layer_stays(tmp_path):
    """One layer with an outlier channel loses much at int8: the search finds it and leaves it alone."""
    model = Loud().eval()
    with torch.no_grad():
        model.loud[0].weight.div_(1e6)
        model.loud[1].weight.mul_(1e6)
        model.first.weight[0] *= 3000  # the range of the next layer's input is that of one channel
        model.loud[0].weight[:, 0] /= 3000
    source = export_onnx(model, X, tmp_path / 'f.onnx')
    ranked = sensitivity(source, [X])
    assert len(ranked) == 4 and ranked[0][1] > 10 * ranked[-1][1] >= 0
    expected = OnnxModel(source)(X)

    def metric(candidate):
        return torch.cosine_similarity(candidate(X).flatten(), expected.flatten(), dim=0).item()

    kept = quantize_within(source, tmp_path / 'i.onnx', [X], metric, budget=0.01)
    assert kept == [ranked[0][0]]
    assert metric(OnnxModel(tmp_path / 'i.onnx')) > 0.99
    with pytest.raises(ValueError, match=r'int8 keeps the metric at .*, below'):
        quantize_within(source, tmp_path / 'i.onnx', [X], metric, budget=0)


def test_errors(tiny_onnx, tmp_path):
    with pytest.raises(ValueError, match="precision must be one of fp16, bf16, got precision='int4'"):
        Half(nn.Identity(), 'int4')
    with pytest.raises(ValueError, match='calibration needs at least one image, got none'):
        out_of_range(nn.Identity(), [])
    with pytest.raises(ValueError, match='calibration needs at least one image, got none'):
        quantize(tiny_onnx, tmp_path / 'x.onnx', [])
    with pytest.raises(ValueError, match=r"ranges must be one of .*, got ranges='max'"):
        quantize(tiny_onnx, tmp_path / 'x.onnx', [X], ranges='max')
    assert not list(tmp_path.iterdir())
