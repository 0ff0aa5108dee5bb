"""A convolution and the activation after it, as one step where eager inference has one."""

from typing import Any, TypeGuard

from torch import Tensor, nn

from ...kernels import conv2d
from ...kernels.dispatch import inferring

_NAMES: dict[type[nn.Module], str] = {nn.ReLU: 'relu', nn.Hardswish: 'hardswish', nn.SiLU: 'silu'}


def conv_act(conv: nn.Module, act: nn.Module, x: Tensor, folded: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """act(conv(x)) of a map (B, C, H, W); in eager inference by `kernels.conv2d`, which may do both at once.

    Args:
        conv: any module; one that is not `foldable` is called as it is.
        act: any module; called as it is if `kernels.conv2d` has no name for it, or hooks watch it.
        folded: weight and bias in the place of the convolution's own, for a foldable one in eager inference.
    """
    if not inferring() or not foldable(conv):
        assert folded is None
        return act(conv(x))
    weight, bias = (conv.weight, conv.bias) if folded is None else folded
    name = None if _watched(act) else _name(act)
    geometry: Any = {'stride': conv.stride, 'padding': conv.padding, 'dilation': conv.dilation, 'groups': conv.groups}
    x = conv2d(x, weight, bias, **geometry, act=name)
    return act(x) if name is None else x


def foldable(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution may be computed without calling its module: no subclass, a quantized one say, no hooks."""
    usual = type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
    return usual and not _watched(conv)


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _name(act: nn.Module) -> str | None:
    if isinstance(act, nn.GELU):
        return 'gelu_tanh' if act.approximate == 'tanh' else 'gelu'
    return _NAMES.get(type(act))
