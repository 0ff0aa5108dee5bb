import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from densezoo.kernels import conv2d, linear, onednn

ACTS = {
    None: lambda x: x,
    'relu': F.relu,
    'hardswish': F.hardswish,
    'silu': F.silu,
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
}


@pytest.fixture
def called(monkeypatch):
    """Names of oneDNN's operators as they are called."""
    names = []

    class Recorder:
        def __getattr__(self, name):
            names.append(name)
            return getattr(mkldnn, name)

    mkldnn = torch.ops.mkldnn
    monkeypatch.setattr(torch.ops, 'mkldnn', Recorder())
    return names


@pytest.mark.parametrize('shape', [(8192, 64), (3, 64, 43, 64), (1, 8197, 64)])
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_linear_is_torchs(shape, bias, called):
    x, weight, bias = torch.randn(shape), torch.randn(72, 64), torch.randn(72) if bias else None
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    # not contiguous: channels before positions
    x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    assert called == ['_linear_pointwise'] * 2 * onednn._AVAILABLE


@torch.no_grad()
def test_small_and_empty_linears_stay_torchs(called):
    weight = torch.randn(72, 64)
    for shape in ((0, 64), (1, 64), (100, 64)):
        x = torch.randn(shape)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert called == []


@pytest.mark.parametrize('act', ACTS)
@pytest.mark.parametrize(
    'geometry',
    [
        dict(kernel=3, padding=(1, 1)),
        dict(kernel=3, padding=(1, 1), stride=(2, 2), groups=8),
        dict(kernel=1),
        dict(kernel=3, padding=(2, 0), dilation=(2, 1)),
    ],
    ids=['full', 'depthwise', 'point', 'dilated'],
)
@torch.no_grad()
def test_conv2d_is_torchs_and_its_activation(act, geometry, called):
    kernel, groups = geometry['kernel'], geometry.get('groups', 1)
    options = {name: value for name, value in geometry.items() if name != 'kernel'}
    weight, bias = torch.randn(16, 8 // groups, kernel, kernel), torch.randn(16)
    for x in (torch.randn(2, 8, 9, 7), torch.randn(2, 9, 7, 8).permute(0, 3, 1, 2)):
        x = 3 * x
        before = x.clone()
        ours = conv2d(x, weight, bias, **options, act=act)
        torch.testing.assert_close(ours, ACTS[act](F.conv2d(x, weight, bias, **options)), atol=1e-4, rtol=1e-4)
        assert torch.equal(x, before)
    assert called == ['_convolution_pointwise'] * 2 * onednn._AVAILABLE
    assert conv2d(x[:0], weight, bias, **options, act=act).shape[0] == 0


@pytest.mark.parametrize('act', ACTS)
def test_conv2d_has_gradients(act, called):
    x, weight = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    ours = torch.autograd.grad(conv2d(x, weight, padding=(1, 1), act=act).square().sum(), (x, weight))
    theirs = torch.autograd.grad(ACTS[act](F.conv2d(x, weight, padding=1)).square().sum(), (x, weight))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)
    assert called == []


def test_who_keeps_torchs_operators(called, monkeypatch):
    x, weight = torch.randn(8192, 64), torch.randn(64, 64)
    linear(x, weight)  # gradients are on
    with torch.no_grad():
        linear(x.double(), weight.double())
        linear(x.bfloat16(), weight.bfloat16())
        linear(x.to('meta'), weight.to('meta'))
        with torch.autocast('cpu', torch.bfloat16):
            assert linear(x, weight).dtype is torch.bfloat16
        monkeypatch.setattr(torch.backends.mkldnn, 'enabled', False)
        linear(x, weight)
        monkeypatch.setattr(torch.backends.mkldnn, 'enabled', True)
        with FlopCounterMode(display=False) as counter:  # it would count nothing
            linear(x, weight)
        assert counter.get_total_flops() == 2 * 8192 * 64 * 64
    assert called == []


def test_unknown_activations():
    with pytest.raises(ValueError, match=r"act must be None or one of relu, hardswish, .*, got act='gulu'"):
        conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1), act='gulu')


def test_programs_hold_torchs_operators():
    layer = nn.Sequential(nn.Linear(64, 64))
    layer.forward = lambda x: conv2d(linear(x, layer[0].weight)[:, None], torch.ones(1, 1, 3, 3), act='gelu')
    sizes = {0: torch.export.Dim('batch', min=2, max=100000)}
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(8192, 9, 64),), dynamic_shapes=[sizes])
    operators = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert operators and not any('mkldnn' in name for name in operators)


def test_without_onednn_values_are_the_same(monkeypatch):
    x, weight = torch.randn(2, 8, 9, 7), torch.randn(16, 8, 3, 3)
    with torch.no_grad():
        fast = {act: conv2d(x, weight, padding=(1, 1), act=act) for act in ACTS}
        monkeypatch.setattr(onednn, '_AVAILABLE', False)
        for act, expected in fast.items():
            torch.testing.assert_close(conv2d(x, weight, padding=(1, 1), act=act), expected, atol=1e-4, rtol=1e-4)
