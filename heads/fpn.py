"""FPN: Feature Pyramid Networks (Lin et al. 2017, arXiv:1612.03144), torchvision's module behind a list interface.

Keys are torchvision's (inner_blocks.i.0, layer_blocks.i.0, extra_blocks.p6); `convert` takes MMDetection's and
MMSegmentation's names. Upsampling is nearest, to the finer map's size. With `mixer` every outgoing map is made by a
token mixer in place of the 3x3 convolution, as HorNet's HorFPN does with gnConv (arXiv:2207.14284).
"""

import re
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from .conv import MixedMap, MixerSpec
from .pyramid import FeatureInfo, PyramidInfo, choose, norm_layer, positive
from .renaming import rename


class MaxPool(ExtraFPNBlock):
    """More levels, each by subsampling the one before."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        for _ in range(self.levels):
            p, names = [*p, F.max_pool2d(p[-1], 1, 2)], [*names, 'pool']
        return p, names


class P6P7(ExtraFPNBlock):
    """More levels by 3x3 convolutions of stride 2, called p6, p7, ...; the first reads the map before it, or the last
    of `c`."""

    def __init__(self, in_channels: int, out_channels: int, levels: int, *, on_output: bool, relu: bool):
        super().__init__()
        self.on_output, self.relu = on_output, relu
        for i in range(levels):
            conv = nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, 2, 1)
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.get_parameter('bias'))
            self.add_module(f'p{6 + i}', conv)

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        x = p[-1] if self.on_output else c[-1]
        for i, (name, conv) in enumerate(self.named_children()):
            x = conv(F.relu(x) if i and self.relu else x)
            p, names = [*p, x], [*names, name]
        return p, names


class FPN(FeaturePyramidNetwork):
    """Maps of one width from maps of several, with a top-down path; list of maps -> list of maps, finest first.

    Args:
        feature_info: channels and strides of the incoming maps.
        out_channels: width of every outgoing map.
        extra: 'none'; 'maxpool' adds one level of twice the last stride by subsampling (R-CNN);
            'p6p7' adds two by convolutions (RetinaNet, FCOS).
        extra_levels: how many 'maxpool' or 'p6p7' add, if not so many.
        extra_source: 'p6p7' reads the last outgoing map ('output'), the same map before its 3x3 convolution
            ('lateral'), or the backbone's last map ('input').
        extra_relu: ReLU before p7 (torchvision; MMDetection leaves it out by default).
        norm: 'none' (published), 'group' or 'batch' after every convolution.
        mixer: dict(type=GnConv, order=2), dict(type=HiLo), or any factory of a module (B, H, W, C) -> (B, H, W, C)
            that takes `dim`; None is the published 3x3 convolution.

    `feature_info` describes the outgoing maps.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        out_channels: int = 256,
        extra: str = 'none',
        extra_levels: int | None = None,
        extra_source: str = 'output',
        extra_relu: bool = True,
        norm: str = 'none',
        mixer: MixerSpec | None = None,
    ):
        info = PyramidInfo.of(feature_info)
        choose('extra', extra, ('none', 'maxpool', 'p6p7'))
        choose('extra_source', extra_source, ('output', 'lateral', 'input'))
        block: ExtraFPNBlock | None = None
        if extra_levels is None:
            extra_levels = {'none': 0, 'maxpool': 1, 'p6p7': 2}[extra]
        elif extra == 'none' or extra_levels < 1:
            raise ValueError(f"extra_levels must be at least 1 and needs extra other than 'none', got {extra_levels}")
        if extra == 'maxpool':
            block = MaxPool(extra_levels)
        elif extra == 'p6p7':
            source_channels = info.channels()[-1] if extra_source == 'input' else out_channels
            block = P6P7(
                source_channels, out_channels, extra_levels, on_output=extra_source == 'output', relu=extra_relu
            )
        strides = info.reduction()
        strides += [strides[-1] * 2 ** (i + 1) for i in range(extra_levels)]
        super().__init__(info.channels(), positive('out_channels', out_channels), block, norm_layer(norm))
        if mixer is not None:
            self.layer_blocks = nn.ModuleList(
                MixedMap(mixer, out_channels, norm=norm, relu=False) for _ in info.channels()
            )
        self.inputs, self.extra_source = info, extra_source
        self.feature_info = PyramidInfo([out_channels] * len(strides), strides)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        self.inputs.check(features)
        laterals = [block(x) for block, x in zip(self.inner_blocks, features)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[-2:])
        maps = [block(x) for block, x in zip(self.layer_blocks, laterals)]
        if self.extra_blocks is None:
            return maps
        return self.extra_blocks(maps, laterals if self.extra_source == 'lateral' else list(features), [])[0]


_RENAMES = (
    (r'^(neck\.)?lateral_convs\.(\d+)\.conv\.', r'inner_blocks.\2.0.'),
    (r'^(neck\.)?lateral_convs\.(\d+)\.(bn|gn)\.', r'inner_blocks.\2.1.'),
    (r'^(neck\.)?fpn_convs\.(\d+)\.conv\.', r'layer_blocks.\2.0.'),
    (r'^(neck\.)?fpn_convs\.(\d+)\.(bn|gn)\.', r'layer_blocks.\2.1.'),
)


def convert(state: dict[str, Any], levels: int) -> dict[str, Any]:
    """A state dict under MMDetection's FPN names (with or without 'neck.') renamed to torchvision's.

    Args:
        state: the neck's entries; names that are no neck's are kept as they are.
        levels: number of maps that enter the neck; MMDetection numbers p6 and p7 on after them.
    """
    renamed = {}
    for key, value in state.items():
        key = rename(key, _RENAMES)
        match = re.match(r'layer_blocks\.(\d+)\.0\.(.+)', key)
        if match and int(match[1]) >= levels:
            key = f'extra_blocks.p{6 + int(match[1]) - levels}.{match[2]}'
        renamed[key] = value
    return renamed
