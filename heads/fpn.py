"""FPN: Feature Pyramid Networks (Lin et al. 2017, arXiv:1612.03144), torchvision's module behind a list interface.

Keys are torchvision's (inner_blocks.i.0, layer_blocks.i.0, extra_blocks.p6); `convert` takes MMDetection's and
MMSegmentation's names. Upsampling is nearest, to the finer map's size. With `mixer` every outgoing map is made by a
token mixer in place of the 3x3 convolution, as HorNet's HorFPN does with gnConv (arXiv:2207.14284).
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .conv import MixedMap, MixerSpec
from .pyramid import FeatureInfo, PyramidInfo, choose, norm_layer, positive
from .renaming import rename


class P6P7(LastLevelP6P7):
    """Two more levels by 3x3 convolutions of stride 2; torchvision decides the source by widths, here it is stated."""

    def __init__(self, in_channels: int, out_channels: int, *, source: str, relu: bool):
        super().__init__(in_channels, out_channels)
        self.use_P5 = source == 'output'
        self.relu = relu

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return [*p, p6, p7], [*names, 'p6', 'p7']


class FPN(FeaturePyramidNetwork):
    """Maps of one width from maps of several, with a top-down path; list of maps -> list of maps, finest first.

    Args:
        feature_info: channels and strides of the incoming maps.
        out_channels: width of every outgoing map.
        extra: 'none'; 'maxpool' adds one level of twice the last stride by subsampling (R-CNN);
            'p6p7' adds two by convolutions (RetinaNet, FCOS).
        extra_source: 'p6p7' reads the last outgoing map ('output') or the backbone's last map ('input').
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
        extra_source: str = 'output',
        extra_relu: bool = True,
        norm: str = 'none',
        mixer: MixerSpec | None = None,
    ):
        info = PyramidInfo.of(feature_info)
        choose('extra', extra, ('none', 'maxpool', 'p6p7'))
        choose('extra_source', extra_source, ('output', 'input'))
        block: ExtraFPNBlock | None = None
        strides = info.reduction()
        if extra == 'maxpool':
            block = LastLevelMaxPool()
            strides.append(strides[-1] * 2)
        elif extra == 'p6p7':
            source_channels = out_channels if extra_source == 'output' else info.channels()[-1]
            block = P6P7(source_channels, out_channels, source=extra_source, relu=extra_relu)
            strides += [strides[-1] * 2, strides[-1] * 4]
        super().__init__(info.channels(), positive('out_channels', out_channels), block, norm_layer(norm))
        if mixer is not None:
            self.layer_blocks = nn.ModuleList(
                MixedMap(mixer, out_channels, norm=norm, relu=False) for _ in info.channels()
            )
        self.inputs = info
        self.feature_info = PyramidInfo([out_channels] * len(strides), strides)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        self.inputs.check(features)
        return list(super().forward(OrderedDict((str(i), x) for i, x in enumerate(features))).values())


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
