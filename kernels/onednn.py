"""Linear layers and convolutions of eager inference on x86 CPUs by oneDNN, activation included.

PyTorch computes a float32 linear layer by MKL's matrix product, though it ships oneDNN, whose product is 1.07 to 1.10
times as fast at Swin's later stages. The activation that follows a convolution costs another pass over the map, and
PyTorch's GELU by tanh more than some convolutions: 11 of 58 ms after one from 32 to 128 channels on 112 x 112, batch 8.
As a step within the convolution it costs 4. torch.compile's code for CPUs calls the same operators. Measurements are in
`kernels/BENCHMARKS.md`.

Training, compiling, exporting, autocast, other devices and dtypes take torch.nn.functional's operators.
"""

import platform
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import inferring

# Below so many multiply-adds nothing is gained: oneDNN takes 12 microseconds to set up a product and packs the weight
# anew each time (HiLo of one 14 x 14 map of 384 channels, whose products have up to 24 million: 2.12 ms for 2.05).
_LEAST_WORK = 2**25

_AVAILABLE = (
    platform.machine().lower() in ('x86_64', 'amd64')
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
)

_PLAIN = (Tensor, nn.Parameter)  # quantized weights and the like are subclasses, with operators of their own


def _identity(x: Tensor, inplace: bool) -> Tensor:
    return x


def _gelu(x: Tensor, inplace: bool, approximate: str = 'none') -> Tensor:
    return (torch.ops.aten.gelu_ if inplace else F.gelu)(x, approximate=approximate)


# by the name of an activation: what it is, and oneDNN's name, numbers and algorithm
ACTIVATIONS: dict[str | None, tuple[Callable[[Tensor, bool], Tensor], tuple[str, list[float], str]]] = {
    None: (_identity, ('none', [], '')),
    'relu': (F.relu, ('relu', [], '')),
    'hardswish': (F.hardswish, ('hardswish', [], '')),
    'silu': (F.silu, ('swish', [], '')),
    'gelu': (_gelu, ('gelu', [], 'none')),
    'gelu_tanh': (partial(_gelu, approximate='tanh'), ('gelu', [], 'tanh')),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as torch.nn.functional.linear.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).
    """
    if not inferring() or x.numel() * weight.shape[0] < _LEAST_WORK or not _taken(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *ACTIVATIONS[None][1])


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    act: str | None = None,
) -> Tensor:
    """An activation of torch.nn.functional.conv2d of a map padded with zeros.

    Args:
        x: (B, in, H, W).
        weight: (out, in // groups, kernel height, kernel width).
        bias: (out,).
        stride, padding, dilation: down and across, positions.
        groups: of channels.
        act: a name in `ACTIVATIONS`, or None.

    Raises:
        ValueError: no such activation.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f'act must be None or one of {", ".join(filter(None, ACTIVATIONS))}, got {act=}')
    activate, step = ACTIVATIONS[act]
    if not inferring() or x.numel() == 0 or not _taken(x, weight):
        return activate(F.conv2d(x, weight, bias, stride, padding, dilation, groups), inferring())
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, *step)


def _taken(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's operators take these tensors now; modes that count or record operators do not know them."""
    return (
        _AVAILABLE
        and not torch.jit.is_tracing()
        and x.device.type == 'cpu'
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled('cpu')
        and torch._C._len_torch_dispatch_stack() == 0
    )
