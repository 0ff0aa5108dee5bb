"""Without this the search could choose worse settings than none, integers leave their bits, or files hold floats."""

import math

import onnx
import pytest
import torch
from torch import nn

from densezoo.deploy import build_engine, check_onnx, export_onnx, find_bridges, quantize_hybrid
from densezoo.deploy.onnx import count_operators
from densezoo.deploy.quantized_layers import QuantizedLayer, limits


class Hybrid(nn.Module):
    """A convolution block, a downsampling layer and attention; one channel between them is much larger, and one is
    far from zero on one side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Convolutions(), Attention()])
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.blocks[0].pw.weight[0] *= 30
            self.blocks[0].pw.bias[1] += 20

    def forward(self, x):
        for block in (self.stem, *self.blocks):
            x = block(x)
        return self.head(x.mean((2, 3)))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.dw, self.pw = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)

    def forward(self, x):
        return self.pw(self.dw(x).relu() + self.grouped(x))


class Attention(nn.Module):
    num_heads = 2

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).view(B, H * W, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        out = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.proj(out).transpose(1, 2).view(x.shape)


MODEL = Hybrid().eval()
IMAGES, OTHERS = torch.randn(2, 4, 3, 12, 10, generator=torch.Generator().manual_seed(1)).unbind(0)
LAYERS = 7


def deviation(model, images=IMAGES):
    with torch.no_grad():
        return float((model(images) - MODEL(images)).square().mean() / MODEL(images).var())


def test_bridges_are_where_kinds_meet():
    assert find_bridges(MODEL, IMAGES) == ['blocks.0', 'blocks.1']
    assert find_bridges(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval(), IMAGES) == []


@pytest.mark.parametrize(('bits', 'most'), [(8, 1e-3), (6, 0.02)])
def test_search(bits, most):
    """Better than blocks of shifts, than per layer and symmetric alone, and better with bridges than without."""
    before = {key: value.clone() for key, value in MODEL.state_dict().items()}
    model = quantize_hybrid(MODEL, IMAGES, bits=bits)
    assert all(torch.equal(value, before[key]) for key, value in MODEL.state_dict().items())
    assert deviation(model) < most and deviation(model, OTHERS) < 2 * most
    assert model.quantization[0].name == 'stem' and len(model.quantization) == LAYERS
    assert {s.name for s in model.quantization if s.bridge} == {
        'blocks.0.dw', 'blocks.0.pw', 'blocks.0.grouped', 'blocks.1.qkv', 'blocks.1.proj'
    }  # fmt: skip
    chosen = {s.name: s.granularity for s in model.quantization}
    assert chosen['blocks.1.qkv'] == 'channel'  # its input's channels differ by 30
    naive = quantize_hybrid(MODEL, IMAGES, bits=bits, mode='block', block=1000)
    assert deviation(model) < deviation(naive) / 4


def test_bridges_are_reconstructed_as_blocks():
    alone, whole = (quantize_hybrid(MODEL, IMAGES, bits=4, bridges=b) for b in ([], ['blocks.1']))
    seen = []
    for model in (alone, whole, MODEL):
        with torch.no_grad():
            seen.append(model.blocks[1](alone.blocks[0](alone.stem(IMAGES)) if model is not MODEL else
                                        MODEL.blocks[0](MODEL.stem(IMAGES))))  # fmt: skip
    assert (seen[1] - seen[2]).square().mean() < (seen[0] - seen[2]).square().mean()
    errors = {s.name: s.error for s in whole.quantization}
    assert errors['blocks.1.proj'] <= errors['blocks.1.qkv']


@pytest.mark.parametrize('mode', ['search', 'block'])
@pytest.mark.parametrize('bits', [3, 6, 8])
def test_integers_stay_within_their_bits(bits, mode):
    model = quantize_hybrid(MODEL, IMAGES, bits=bits, weight_bits=5, mode=mode, block=16)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == LAYERS
    for layer in layers:
        low, high = limits(5)
        assert layer.weight.dtype == torch.int8 and low <= layer.weight.min() and layer.weight.max() <= high
        with torch.no_grad():
            x = 100 * torch.randn(2, layer.shape[1] * (layer.settings or {'groups': 1})['groups'], 9, 9)
            x = x if layer.settings else x.movedim(1, -1)
            q = layer.integers(x)
        assert q.dtype == torch.int8 and limits(bits)[0] <= q.min() and q.max() <= limits(bits)[1]


def test_blocks_have_shifts():
    model = quantize_hybrid(MODEL, IMAGES, mode='block', block=3)
    layer = model.blocks[1].qkv
    for scale in (layer.weight_scale, layer.input_scale):
        assert torch.equal(scale.log2(), scale.log2().round())
    assert layer.weight_scale.shape == (24 * 3,) and layer.input_scale.shape == (8,)
    torch.testing.assert_close(layer.float_weight(), MODEL.blocks[1].qkv.weight.detach(), rtol=0, atol=4e-3)
    assert {s.granularity for s in model.quantization} == {'block'}
    wide = quantize_hybrid(MODEL, IMAGES, mode='block', block=1000).blocks[1].qkv  # never wider than the rows
    assert wide.weight.shape == (24, 8) and len(wide.weight_scale) == 24
    assert deviation(model) < 0.01


@pytest.mark.parametrize(
    'options',
    [
        {'bits': 6, 'schemes': ['symmetric']},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({'mode': 'block', 'block': 5, 'bits': 6}, marks=pytest.mark.slow),
    ],
)
def test_files_hold_integers(options, tmp_path):
    """The Q/DQ file computes the same; TensorRT takes those without zero points and with one scale per input."""
    model = quantize_hybrid(MODEL, IMAGES, **options)
    path = export_onnx(model, IMAGES, tmp_path / 'q.onnx')
    (row,) = check_onnx(model, path, OTHERS)
    assert row.max_abs < 1e-4
    counts = count_operators(path)
    inputs = counts['QuantizeLinear']
    assert inputs in (LAYERS, LAYERS - 1)  # two layers share theirs, and may share its integers
    assert counts['DequantizeLinear'] == inputs + LAYERS
    weights = [t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) > 1 and math.prod(t.dims) > 8]
    assert weights == LAYERS * [onnx.TensorProto.INT8]
    if 'schemes' in options:
        assert {s.scheme for s in model.quantization} == {'symmetric'}
        assert build_engine(path, tmp_path / 'q.engine', batch=(1, 4, 8))['layers'] > 5


def test_excluded_layers_stay():
    model = quantize_hybrid(MODEL, IMAGES, exclude=['stem', 'head'])
    assert type(model.stem) is nn.Conv2d and len(model.quantization) == LAYERS - 2


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'bits': 9}, 'bits must be from 2 to 8, got bits=9'),
        ({'weight_bits': 1}, 'weight_bits must be from 2 to 8, got weight_bits=1'),
        ({'mode': 'fast'}, "mode must be one of search, block, got mode='fast'"),
        ({'schemes': ['affine']}, r"schemes must be of symmetric, asymmetric, got schemes=\['affine'\]"),
        ({'block': 0}, 'block must be positive, got block=0'),
        ({'images': IMAGES[0]}, r'images must be \(B, C, H, W\), at least one'),
        ({'images': IMAGES[:0]}, r'images must be \(B, C, H, W\), at least one'),
        ({'bridges': ['block.1']}, r"bridges must name parts of the model, got 'block\.1'; did you mean 'blocks\.1'"),
        ({'exclude': ['hea']}, "exclude must name parts of the model, got 'hea'; did you mean 'head'"),
        ({'model': nn.ReLU()}, 'ReLU has no linear layers or convolutions to quantize'),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        quantize_hybrid(**{'model': MODEL, 'images': IMAGES, **options})
