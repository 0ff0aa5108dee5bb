"""Without this a packed model could compute something else than the one that was trained, or save nothing."""

import io

import pytest
import torch
from torch import nn

from densezoo.backbones import binarize, create_model, load_checkpoint, pack
from densezoo.backbones.binary import (
    BinaryLinear,
    BinaryProduct,
    PackedBinaryLinear,
    PackedProduct,
    ShiftLinear,
    ShiftSumLinear,
)
from densezoo.backbones.binary.hashing import hashes_of
from densezoo.backbones.registry import model_class

SWIN = 'swin_tiny_patch4_window7_224'
ALL = ('attention', 'mlp', 'merging')


def small(name=SWIN, **overrides):
    torch.manual_seed(0)
    reduced = {**model_class(name).reduced, 'depths': (1, 2, 1, 1)} if 'depth' not in overrides else {}
    return create_model(name, **{**reduced, **overrides}).eval()


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def saved(model) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def scatter_zeros(layer):
    """Some weights are exactly the mean of their row, one row is constant, and scales have both signs."""
    with torch.no_grad():
        for row in range(0, layer.out_features, 3):
            layer.weight[row] = torch.tensor([1.0, -1.0, 0.0]).repeat(layer.in_features)[: layer.in_features]
            layer.weight[row] -= layer.weight[row].mean()  # whole thirds: the mean is exactly 0
        layer.weight[1] = 0.25
        if hasattr(layer, 'scaling_factor'):
            layer.scaling_factor[::2] *= -1
        if layer.bias is not None:
            layer.bias.normal_(std=0.1)
    return layer


@pytest.mark.parametrize('options', [{}, {'input': 'float'}, {'input': 'elastic'}, {'scale': 'mean', 'bias': False}])
@pytest.mark.parametrize('width', [3, 33, 96])
def test_layer(width, options):
    torch.manual_seed(0)
    layer = scatter_zeros(BinaryLinear(width, 7, **options)).eval()
    if layer.quantizer is not None:
        layer.quantizer.alpha.data.fill_(0.7)
    packed = pack(layer)
    assert isinstance(packed, PackedBinaryLinear) and (width == 33 or packed.zeros is not None)
    assert packed.weight.shape == (7, -(-width // 32)) and not list(packed.parameters())
    x = torch.randn(2, 5, width)
    x[x.abs() < 0.2] = 0
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x), rtol=0, atol=1e-5)
    fresh = pack(BinaryLinear(width, 7, **options).eval())
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), packed(x))


def test_signs_of_outputs_need_no_scale():
    torch.manual_seed(0)
    layer = BinaryLinear(40, 30).eval()
    scatter_zeros(layer)
    with torch.no_grad():
        layer.weight[1].normal_()
        packed = PackedBinaryLinear.from_trained(layer, output_signs=True)
        x = torch.randn(50, 40)
        assert packed.scale is None and torch.equal(packed(x).sign(), layer(x).sign())


@pytest.mark.parametrize('options', [{}, {'form': 'q'}, {'bias': False, 'integer_bits': 4, 'fraction_bits': 5}])
def test_shift_layer(options):
    torch.manual_seed(0)
    layer = ShiftLinear(50, 7, **options).eval()
    packed = pack(layer)
    x = torch.randn(2, 3, 50)
    with torch.no_grad():
        assert torch.equal(packed(x), layer(x))
    assert packed.bits == (8 if options.get('form') == 'q' else 5)
    fresh = pack(ShiftLinear(50, 7, **options).eval())
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(x), packed(x))


def test_product_with_residuals():
    product = BinaryProduct(scale=0.5).eval()
    holder = pack(nn.ModuleList([product, BinaryLinear(3, 3)]).eval())
    q, k, v = torch.randn(3, 2, 4, 7, 8).unbind(0)
    residual = (torch.randn(2, 4, 7, 7), torch.randn(2, 4, 7, 8))
    assert isinstance(holder[0], PackedProduct)
    assert torch.equal(holder[0](q, k, v), product(q, k, v))
    assert torch.equal(holder[0](q, k, v, None, residual), product(q, k, v, None, residual))


@pytest.mark.parametrize('settings', [{'parts': ALL}, {'mlp_input': 'sign', 'map': 'step'}, {'residual_rank': 4}])
def test_swin(settings):
    """The pyramid at a size whose windows need padding and masks; the same class, methods and floating-point keys."""
    model = binarize(small(features_only=True), 'bivit', **settings).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    packed = pack(model)
    with torch.no_grad():
        for ours, simulated in zip(packed(images(2, 3, 44, 72)), model(images(2, 3, 44, 72)), strict=True):
            assert (ours - simulated).abs().max() <= 1e-3 * simulated.abs().max()
    assert type(packed) is type(model) and packed.feature_info.channels() == model.feature_info.channels()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())


def test_deit_and_shifts():
    for method, settings in (('bivit', {}), ('shiftadd', {})):
        name = 'deit_tiny_patch16_224' if method == 'bivit' else 'pvt_v2_b0'
        overrides = {'depth': 2, 'dim': 48} if method == 'bivit' else {}
        model = binarize(small(name, num_classes=5, **overrides), method, **settings).eval()
        for hash in hashes_of(model):
            hash.trained.fill_(True)
        with torch.no_grad():
            expected = model(images(2, 3, 64, 64))
            torch.testing.assert_close(pack(model)(images(2, 3, 64, 64)), expected, rtol=1e-3, atol=1e-3)


def test_a_packed_checkpoint_loads():
    model = binarize(small(num_classes=5), 'bivit').eval()
    torch.manual_seed(1)
    other = pack(binarize(small(num_classes=5, depths=(1, 2, 1, 1)), 'bivit').eval())
    packed = pack(model)
    state = torch.load(io.BytesIO(saved(packed)), weights_only=True)
    for key, value in state.items():
        if value.dtype == torch.float32:
            state[key] = value + 0.01
    load_checkpoint(other, state)
    packed.load_state_dict(state)
    assert torch.equal(other(images(1, 3, 64, 64)), packed(images(1, 3, 64, 64)))


def test_size_of_the_checkpoint():
    """Swin-T's backbone: what the patch merging keeps in float32 is two thirds of the first file."""
    torch.manual_seed(0)
    model = create_model(SWIN, features_only=True).eval()
    full = len(saved(model))
    assert 11 * len(saved(pack(binarize(model, 'bivit').eval()))) <= full
    assert 20 * len(saved(pack(binarize(model, 'bivit', parts=ALL).eval()))) <= full


def test_exported_equals_eager(caplog):
    torch.manual_seed(0)
    layers = [scatter_zeros(BinaryLinear(40, 50)), ShiftLinear(50, 9, bias=False), ShiftSumLinear(9, 8)]
    model, x = pack(nn.Sequential(*layers, BinaryLinear(8, 3)).eval()), images(2, 40)
    program = torch.export.export(model, (x,))
    assert 'have no ONNX form: packed layers are exported as floating-point products' in caplog.text
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-5)


def test_an_onnx_file_of_small_layers_holds_their_words(tmp_path):
    from densezoo.deploy import check_onnx, export_onnx

    torch.manual_seed(0)
    layers = [BinaryLinear(512, 512), ShiftLinear(512, 90), ShiftSumLinear(90, 512)]  # 8192 words each, at most
    model, x = pack(nn.Sequential(*layers).eval()), images(2, 3, 4, 512)
    path = export_onnx(model, x, tmp_path / 'packed.onnx')
    words = sum(buffer.nbytes for buffer in model.buffers() if buffer.dtype == torch.int32)
    assert path.stat().st_size < words + 100_000 < 0.2 * 4 * 512 * (512 + 90 + 90)
    assert all(row.max_abs < 1e-3 for row in check_onnx(model, path, x))


@pytest.mark.slow
def test_onnx_and_engine(tmp_path):
    from densezoo.deploy import build_engine, check_onnx, export_onnx

    x = images(2, 3, 64, 64)
    model = binarize(small(features_only=True, dims=(96, 192, 384, 768)), 'bivit', parts=ALL).eval()
    simulated = export_onnx(model, x, tmp_path / 'simulated.onnx')
    path = export_onnx(pack(model), x, tmp_path / 'packed.onnx')
    assert all(row.max_abs < 1e-4 for row in check_onnx(pack(model), path, x))
    assert path.stat().st_size < simulated.stat().st_size / 8
    assert build_engine(path, tmp_path / 'packed.engine', batch=(1, 2, 4))['layers'] > 10


def test_errors():
    model = binarize(small(), 'bivit')
    with pytest.raises(ValueError, match=r'pack needs a module in evaluation mode, and it is in training mode; call'):
        pack(model.train())
    model.eval().stages[1].train()
    with pytest.raises(ValueError, match=r"and its part 'stages\.1' is in training mode"):
        pack(model)
    with pytest.raises(ValueError, match='has no binary or power-of-two weights to pack; binarize it first: binarize'):
        pack(small())
    with pytest.raises(ValueError, match='PackedBinaryLinear is packed already'):
        pack(pack(BinaryLinear(3, 3).eval()))
