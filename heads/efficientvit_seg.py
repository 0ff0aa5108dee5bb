"""The segmentation head of EfficientViT (MIT): Multi-Scale Linear Attention ..., arXiv 2205.14756.

Every level goes through a 1x1 convolution and norm, is enlarged to the finest level's size by bicubic interpolation and
summed; residual convolution blocks and a classifier follow. Logits have the finest level's stride: 8, where the levels
with strides 8, 16 and 32 come in. Key names are the authors' (https://github.com/mit-han-lab/efficientvit, Apache-2.0)
after `convert`. Targets and results: see `segmentation`.
Differs: sizes that 32 does not divide are taken too. The authors' training is not published: the loss is ours.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pyramid import FeatureInfo, choose, positive
from .segmentation import SegmentationHead

_ACTS: dict[str, Callable[[], nn.Module]] = {
    'hswish': nn.Hardswish,
    'gelu': partial(nn.GELU, approximate='tanh'),
    'relu': nn.ReLU,
}


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, activation (None: none)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int = 1,
        *,
        groups: int = 1,
        act: str | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=eps)
        self.act = _ACTS[act]() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResidualConv(nn.Module):
    """x + inverted convolution ('mb': 1x1, 3x3 depthwise, 1x1) or fused one ('fused': 3x3, 1x1)."""

    def __init__(self, channels: int, *, kind: str, ratio: float, act: str, eps: float):
        super().__init__()
        wide = round(channels * ratio)
        self.main = nn.ModuleDict()
        if kind == 'mb':
            self.main['inverted_conv'] = ConvNormAct(channels, wide, act=act, eps=eps)
            self.main['depth_conv'] = ConvNormAct(wide, wide, 3, groups=wide, act=act, eps=eps)
        else:
            self.main['spatial_conv'] = ConvNormAct(channels, wide, 3, act=act, eps=eps)
        self.main['point_conv'] = ConvNormAct(wide, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for layer in self.main.values():
            branch = layer(branch)
        return x + branch


class EfficientViTSeg(SegmentationHead):
    """Sum of the levels at the finest one's size, residual convolutions, classifier.

    Args:
        feature_info: channels and strides of the maps; the authors' have the strides 8, 16 and 32.
        num_classes: K; class ids are 0..K-1.
        channels, depth: width and number of the residual convolutions.
        block: 'mb' (the B models) or 'fused' (the L models).
        ratio: width inside them over `channels`.
        final_ratio: width of the layer before the classifier over `channels`; None leaves the layer out.
        act: 'hswish' (the B models), 'gelu' (the L models) or 'relu'.
        norm_eps: of the norms; the L models have 1e-7.
        dropout: channel dropout before the classifier.
        ignore_index, class_weight, dice_weight, lovasz_weight, average: of the loss, see `SegmentationHead`.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        channels: int = 32,
        depth: int = 1,
        block: str = 'mb',
        ratio: float = 4.0,
        final_ratio: float | None = 4.0,
        act: str = 'hswish',
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        ignore_index: int = 255,
        class_weight: Sequence[float] | None = None,
        dice_weight: float = 0.0,
        lovasz_weight: float = 0.0,
        average: str = 'valid',
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            ignore_index=ignore_index,
            class_weight=class_weight,
            dice_weight=dice_weight,
            lovasz_weight=lovasz_weight,
            average=average,
        )
        positive('channels', channels)
        choose('block', block, ('mb', 'fused'))
        choose('act', act, tuple(_ACTS))
        self.input_ops = nn.ModuleList(ConvNormAct(width, channels, eps=norm_eps) for width in self.inputs.channels())
        self.middle = nn.Sequential(
            *(ResidualConv(channels, kind=block, ratio=ratio, act=act, eps=norm_eps) for _ in range(depth))
        )
        wide = channels if final_ratio is None else round(channels * final_ratio)
        self.final = ConvNormAct(channels, wide, act=act, eps=norm_eps) if final_ratio is not None else nn.Identity()
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(wide, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.classifier.get_parameter('bias'))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of maps -> logits (B, K, h, w) at the first map's size."""
        self.inputs.check(features)
        total = self.input_ops[0](features[0])
        size = total.shape[-2:]
        for layer, x in zip(list(self.input_ops)[1:], features[1:]):
            x = layer(x)
            # in float32 at least: PyTorch's cubic interpolation is a sum of products that cancel
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            total = total + F.interpolate(x, size=size, mode='bicubic', align_corners=False)
        return self.classifier(self.dropout(self.final(self.middle(total))))


def convert(state: dict[str, Tensor], levels: int = 3) -> dict[str, Tensor]:
    """The head's part of an authors' segmentor under our names; theirs lists the levels from coarse to fine.

    Args:
        levels: maps that enter.
    """
    final = any(key.startswith('head.output_ops.0.op_list.1.') for key in state)
    renamed = {}
    for key, value in state.items():
        if not key.startswith('head.'):
            continue
        for number in range(levels):
            for theirs in (f'head.input_ops.{number}.op_list.0.', f'head.input_ops.{number}.'):
                if key.startswith(theirs):
                    renamed[f'input_ops.{levels - 1 - number}.{key.removeprefix(theirs)}'] = value
                    break
        if key.startswith('head.middle.op_list.'):
            renamed['middle.' + key.removeprefix('head.middle.op_list.')] = value
        elif key.startswith('head.output_ops.0.op_list.'):
            last = f'head.output_ops.0.op_list.{int(final)}.conv.'
            name = 'classifier.' + key.removeprefix(last) if key.startswith(last) else 'final.' + key.split('.', 5)[5]
            renamed[name] = value
    return renamed
