"""Convolutions and map mixers that decoders share."""

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .pyramid import norm_layer

# A factory of a module (B, H, W, C) -> (B, H, W, C), called with dim=C; or dict(type=that factory, option=...).
MixerSpec = Callable[..., nn.Module] | Mapping[str, Any]


class ConvNormReLU(nn.Module):
    """Convolution without bias, norm, ReLU, of the same size of map; with norm='none' the convolution has a bias."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int = 3, *, norm: str, dilation: int = 1, groups: int = 1
    ):
        super().__init__()
        layer = norm_layer(norm)
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            in_channels, channels, kernel, padding=padding, dilation=dilation, groups=groups, bias=layer is None
        )
        self.bn = layer(channels) if layer else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """1x1 convolution to logits that are nearly 0 at first: weights of deviation 0.01."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.get_parameter('bias'))
    return conv


class SeparableConv(nn.Module):
    """3x3 depthwise convolution, norm, ReLU, then a 1x1 convolution, norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, *, norm: str, dilation: int = 1):
        super().__init__()
        self.depthwise_conv = ConvNormReLU(in_channels, in_channels, norm=norm, dilation=dilation, groups=in_channels)
        self.pointwise_conv = ConvNormReLU(in_channels, channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class MixedMap(nn.Module):
    """A token mixer on a map (B, C, H, W), then a norm, then perhaps ReLU.

    Args:
        mixer: dict(type=GnConv, order=2), dict(type=HiLo), ... or a callable that takes dim.
        channels: C.
        norm: 'none', 'group' or 'batch'.
        relu: whether ReLU follows.
    """

    def __init__(self, mixer: MixerSpec, channels: int, *, norm: str, relu: bool):
        super().__init__()
        self.mixer = build_mixer(mixer, channels)
        layer = norm_layer(norm)
        self.bn = layer(channels) if layer else nn.Identity()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        # Norms and resizing want maps as convolutions leave them; without the copy they would see strided ones.
        x = self.bn(self.mixer(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2))
        return F.relu(x) if self.relu else x


def build_mixer(mixer: MixerSpec, channels: int) -> nn.Module:
    """The mixer for maps of `channels`; TypeError for anything that is no factory."""
    options = dict(mixer) if isinstance(mixer, Mapping) else {'type': mixer}
    kind = options.pop('type', None)
    if isinstance(kind, str) and '.' in kind:  # as a dumped config names it
        kind = pkgutil.resolve_name(kind)
    if not callable(kind):
        raise TypeError(f'mixer must be a callable or dict(type=callable, ...), as dict(type=GnConv), got {mixer!r}')
    return kind(dim=channels, **options)
