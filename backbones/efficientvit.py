"""EfficientViT (MIT): Multi-Scale Linear Attention for High-Resolution Dense Prediction, arXiv 2205.14756.

Written from the paper and the facts of the authors' code, https://github.com/mit-han-lab/efficientvit (Apache-2.0; the
weights carry the same licence). Key names inside blocks are the authors'. Their first stage, at stride 2, and the
strided block that opens their second one are our stem; the strided block of every later stage is our downsampling, so
`depths` counts the blocks after it. Differs: stochastic depth rises per block, and from 0; the authors' own schedule
counts residual branches.
"""

# B batch, C channels, H W size of the current stage, h heads, d head width, K classes
import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..kernels import relu_linear_attention
from .layers import ACTIVATIONS, drop_path_schedule, mixer
from .layers.conv import ConvNorm
from .layers.grid import to_first, to_last
from .layers.linear import Linear
from .layers.lookup import choose
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage


class InvertedConv(nn.Module):
    """Widen by a 1x1 convolution, mix by a 3x3 depthwise one, narrow by a 1x1 one; (B, C, H, W) maps.

    Args:
        fewer_norms: the first two convolutions have a bias instead of a norm.
    """

    def __init__(
        self, in_dim: int, dim: int, *, ratio: float, act: str, eps: float, stride: int = 1, fewer_norms: bool = False
    ):
        super().__init__()
        wide = round(in_dim * ratio)
        first: dict[str, Any] = {'bias': fewer_norms, 'norm': not fewer_norms, 'act': act, 'eps': eps}
        self.inverted_conv = ConvNorm(in_dim, wide, **first)
        self.depth_conv = ConvNorm(wide, wide, kernel=3, stride=stride, groups=wide, **first)
        self.point_conv = ConvNorm(wide, dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class SeparableConv(nn.Module):
    """A 3x3 depthwise and a 1x1 convolution; (B, C, H, W) maps."""

    def __init__(self, dim: int, *, act: str, eps: float):
        super().__init__()
        self.depth_conv = ConvNorm(dim, dim, kernel=3, groups=dim, act=act, eps=eps)
        self.point_conv = ConvNorm(dim, dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(x))


class FusedConv(nn.Module):
    """Widen by a full 3x3 convolution, narrow by a 1x1 one; (B, C, H, W) maps."""

    def __init__(self, in_dim: int, dim: int, *, ratio: float, act: str, eps: float, stride: int = 1):
        super().__init__()
        wide = round(in_dim * ratio)
        self.spatial_conv = ConvNorm(in_dim, wide, kernel=3, stride=stride, act=act, eps=eps)
        self.point_conv = ConvNorm(wide, dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.spatial_conv(x))


class TwoConvs(nn.Module):
    """Two full 3x3 convolutions; (B, C, H, W) maps."""

    def __init__(self, dim: int, *, act: str, eps: float):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, kernel=3, act=act, eps=eps)
        self.conv2 = ConvNorm(dim, dim, kernel=3, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


@mixer('lite_mla')
class LiteMLA(nn.Module):
    """Multi-scale ReLU linear attention: between positions, and between their surroundings of each scale.

    q, k and v of a surrounding are those of its positions under a learnt convolution. Maps (B, H, W, C) of any size.

    Args:
        head_dim: width of a head; divides dim.
        scales: odd sides of the surroundings.
        eps: of the norm that follows.
    """

    def __init__(self, *, dim: int, head_dim: int = 16, scales: Sequence[int] = (5,), eps: float = 1e-5):
        super().__init__()
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f'head_dim must divide the channels, got {head_dim=}, {dim=}')
        self.heads = dim // head_dim
        self.qkv = ConvNorm(dim, 3 * dim, norm=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * dim, 3 * dim, scale, padding=scale // 2, groups=3 * dim, bias=False),
                nn.Conv2d(3 * dim, 3 * dim, 1, groups=3 * self.heads, bias=False),
            )
            for scale in scales
        )
        self.proj = ConvNorm(dim * (1 + len(scales)), dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(to_first(x))
        scales = [to_last(qkv), *(to_last(surroundings(qkv)) for surroundings in self.aggreg)]
        out = torch.cat([relu_linear_attention(each, heads=self.heads) for each in scales], -1)
        return to_last(self.proj(to_first(out)))


class ConvBlock(nn.Module):
    """x + drop(main(x)) with convolutions on (B, C, H, W), between maps (B, H, W, C)."""

    def __init__(self, main: nn.Module, drop_path: float):
        super().__init__()
        self.main = main
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(to_last(self.main(to_first(x))))


class AttentionBlock(nn.Module):
    """Linear attention, then an inverted convolution, each with its residual; neither is preceded by a norm."""

    def __init__(self, *, dim: int, head_dim: int, ratio: float, act: str, eps: float, drop_path: float):
        super().__init__()
        self.context_module = LiteMLA(dim=dim, head_dim=head_dim, eps=eps)
        self.local_module = InvertedConv(dim, dim, ratio=ratio, act=act, eps=eps, fewer_norms=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.context_module(x))
        return x + self.drop_path(to_last(self.local_module(to_first(x))))


class Stem(nn.Module):
    """Image (B, C, H, W) to map (B, H, W, C) at stride 4: a strided convolution, residual blocks, a strided block.

    Args:
        blocks: branches of the residual blocks at stride 2.
        strided: takes stride 2 to 4.
    """

    def __init__(
        self, in_chans: int, dim: int, *, blocks: Sequence[nn.Module], strided: nn.Module, act: str, eps: float
    ):
        super().__init__()
        self.conv = ConvNorm(in_chans, dim, kernel=3, stride=2, act=act, eps=eps)
        self.blocks = nn.ModuleList(blocks)
        self.strided = strided

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            x = x + block(x)
        return to_last(self.strided(x))


class Downsample(nn.Module):
    """A strided convolution block between maps (B, H, W, C)."""

    def __init__(self, main: nn.Module):
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return to_last(self.main(to_first(x)))


class EfficientViTHead(nn.Module):
    """Widen the map by a 1x1 convolution, pool, widen again, LayerNorm, dropout, linear. Maps (B, C, H, W)."""

    last = 'fc'

    def __init__(self, dim: int, num_classes: int, drop_rate: float, *, widths: tuple[int, int], act: str, eps: float):
        super().__init__()
        self.hidden_size = widths[1]
        self.conv = ConvNorm(dim, widths[0], act=act, eps=eps)
        self.linear = Linear(widths[0], widths[1], bias=False)
        self.norm = nn.LayerNorm(widths[1], eps=eps)
        self.act = choose('act', act, ACTIVATIONS)()
        self.drop = nn.Dropout(drop_rate)
        self.fc = Linear(widths[1], num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act(self.norm(self.linear(self.conv(x).mean((2, 3)))))
        return x if pre_logits else self.fc(self.drop(x))


class EfficientViT(Hierarchical):
    """Convolution blocks in the early stages, linear attention between convolutions in the late ones.

    Args:
        depths, dims: blocks and channels of each stage; the block that opens a stage and halves the map is not counted.
        stem_depth, stem_dim: blocks and channels at stride 2.
        blocks: per stage 'mb' (inverted convolutions), 'fused' (full 3x3 ones) or 'attention'.
        stem_block: 'separable' or 'two_convs'.
        mlp_ratio: width of the blocks' convolutions over that of the stage, one for all stages or one per stage.
        down_ratio: the same of the blocks that open a stage, over the width before.
        fewer_norms: per stage, whether convolutions before the last of a block have a bias instead of a norm.
        head_dim: width of the attention heads; divides the channels of stages with attention.
        head_widths: channels of the classifier's convolution and of its hidden layer.
        act: activation by name.
        norm_eps: of all norms.
        img_size: not needed, taken for the sake of a common interface.
        The others: see `Hierarchical.assemble`.
    """

    beside_backbone = ('head.op_list.',)
    reduced = {'depths': (1, 1, 2, 1), 'dims': (16, 32, 48, 64), 'stem_dim': 8, 'head_dim': 16, 'head_widths': (64, 48)}

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 1, 2, 2),
        dims: Sequence[int] = (16, 32, 64, 128),
        stem_depth: int = 1,
        stem_dim: int = 8,
        blocks: Sequence[str] = ('mb', 'mb', 'attention', 'attention'),
        stem_block: str = 'separable',
        mlp_ratio: float | Sequence[float] = 4.0,
        down_ratio: float | Sequence[float] = 4.0,
        fewer_norms: bool | Sequence[bool] = (False, False, True, True),
        head_dim: int = 16,
        head_widths: tuple[int, int] = (1024, 1280),
        act: str = 'hardswish',
        norm_eps: float = 1e-5,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        depths, dims = check_stages(depths, dims)
        blocks = per_stage('blocks', blocks)
        if len(head_widths) != 2 or min(head_widths) < 1:
            raise ValueError(f'head_widths must be two positive numbers, got {head_widths=}')
        ratios, down_ratios = per_stage('mlp_ratio', mlp_ratio), per_stage('down_ratio', down_ratio)
        fewer = per_stage('fewer_norms', fewer_norms)
        common: dict[str, Any] = {'act': act, 'eps': norm_eps}

        def conv(kind: str, in_dim: int, dim: int, ratio: float, fewer_norms: bool, stride: int = 1) -> nn.Module:
            if kind == 'fused':
                return FusedConv(in_dim, dim, ratio=ratio, stride=stride, **common)
            return InvertedConv(in_dim, dim, ratio=ratio, stride=stride, fewer_norms=fewer_norms, **common)

        def block(s: int, rate: float) -> nn.Module:
            if blocks[s] == 'attention':
                return AttentionBlock(dim=dims[s], head_dim=head_dim, ratio=ratios[s], drop_path=rate, **common)
            return ConvBlock(conv(blocks[s], dims[s], dims[s], ratios[s], fewer[s]), rate)

        for kind in blocks:
            choose('block', kind, dict.fromkeys(('mb', 'fused', 'attention')))
        stem_blocks = {'separable': SeparableConv, 'two_convs': TwoConvs}
        make_stem_block = choose('stem_block', stem_block, stem_blocks)
        strided = [
            conv(blocks[s], a, b, down_ratios[s], fewer[s], stride=2)
            for s, (a, b) in enumerate(itertools.pairwise((stem_dim, *dims)))
        ]
        stem = Stem(
            in_chans,
            stem_dim,
            blocks=[make_stem_block(stem_dim, **common) for _ in range(stem_depth)],
            strided=strided[0],
            **common,
        )
        self.assemble(
            dims=dims,
            downsamplings=[stem, *(Downsample(main) for main in strided[1:])],
            stages=[
                [block(s, rate) for rate in rates] for s, rates in enumerate(drop_path_schedule(depths, drop_path_rate))
            ],
            output_norm=None,
            norm=lambda dim: nn.Identity(),
            head=partial(EfficientViTHead, widths=head_widths, act=act, eps=norm_eps),
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of `forward_features`' map, whose channels the head widens before it pools."""
        self._require_classifier('forward_head')
        return self.head(x, pre_logits=pre_logits) if self.num_classes else x.mean((2, 3))

    def init_weights(self, module: nn.Module) -> None:
        """Truncated normal, and zeros in the last norm of each residual branch, as the authors train."""
        super().init_weights(module)
        if isinstance(module, ConvBlock):
            branches: Any = [module.main]
        elif isinstance(module, Stem):
            branches = module.blocks
        elif isinstance(module, AttentionBlock):
            module.context_module.proj.start_at_zero()
            branches = [module.local_module]
        else:
            branches = []
        for branch in branches:
            (branch.conv2 if isinstance(branch, TwoConvs) else branch.point_conv).start_at_zero()

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, with or without the `backbone.` before those of their backbone."""
        small = any('input_stem.op_list.' in key for key in state)  # the large models call it their stage 0
        return {_new_name(key, 'input_stem' if small else 'stages.0'): value for key, value in state.items()}


_LAYER = re.compile(
    r'(?:backbone\.)?(input_stem|stages\.\d+)\.op_list\.(\d+)\.(context_module\.|local_module\.)?(?:main\.)?'
)
_HEAD = {'0.': 'conv.', '2.linear.': 'linear.', '2.norm.': 'norm.', '3.linear.': 'fc.'}


def _new_name(key: str, stem: str) -> str:
    """Our name of an authors' key; `stem` is what they call the stage at stride 2."""
    for theirs, ours in _HEAD.items():
        if key.startswith(f'head.op_list.{theirs}'):
            return key.replace(f'head.op_list.{theirs}', f'head.{ours}')
    layer = _LAYER.match(key)
    if layer is None:
        return key
    place = int(layer[2])
    if layer[1] == stem:
        return 'downsample_layers.0.' + (f'blocks.{place - 1}.' if place else 'conv.') + key[layer.end() :]
    stage = int(layer[1].removeprefix('stages.')) - (stem == 'stages.0')
    if place == 0:  # the strided block
        return f'downsample_layers.{stage}.' + ('main.' if stage else 'strided.') + key[layer.end() :]
    return f'stages.{stage}.{place - 1}.{layer[3] or "main."}{key[layer.end() :]}'


_HUB = 'https://huggingface.co/han-cai/efficientvit-cls/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2205.14756',
    'origin': 'https://github.com/mit-han-lab/efficientvit',
    'first_conv': 'downsample_layers.0.conv.conv',
    'classifier': 'head.fc',
}


def _weights(file: str, crop_pct: float, params: float, figures: dict[int, tuple[float, float]]) -> list[Any]:
    """Published sets of one model, from figures of size -> (top-1, MACs in 1e9)."""
    return [
        weights(
            f'r{size}_in1k',
            f'{_HUB}resolve/main/{file}_r{size}.pt',
            top1=top1,
            macs=macs,
            params=params,
            size=size,
            crop_pct=crop_pct,
            **_PAPER,
        )
        for size, (top1, macs) in figures.items()
    ]


_LARGE: dict[str, Any] = {
    'blocks': ('fused', 'fused', 'mb', 'attention'),
    'stem_block': 'two_convs',
    'mlp_ratio': (4, 4, 4, 6),
    'down_ratio': (16, 16, 16, 24),
    'head_dim': 32,
    'act': 'gelu_tanh',
    'norm_eps': 1e-7,
    'drop_path': 0.1,
}

# the authors' list of models names weights of b0, their table of results does not
register(
    'efficientvit_cls_b0',
    EfficientViT,
    depths=(1, 1, 2, 2),
    dims=(16, 32, 64, 128),
    stem_dim=8,
    head_dim=16,
    head_widths=(1024, 1280),
    drop_path=0.05,
    weights=[weights('r224_in1k', None, page=_HUB, top1=None, params=3.4, macs=None, crop_pct=0.95, **_PAPER)],
)
register(
    'efficientvit_cls_b1',
    EfficientViT,
    depths=(1, 2, 3, 4),
    dims=(32, 64, 128, 256),
    stem_dim=16,
    head_dim=16,
    head_widths=(1536, 1600),
    drop_path=0.05,
    weights=_weights('efficientvit_b1', 0.95, 9.1, {224: (79.390, 0.52), 256: (79.918, 0.68), 288: (80.410, 0.86)}),
)
register(
    'efficientvit_cls_b2',
    EfficientViT,
    depths=(2, 3, 4, 6),
    dims=(48, 96, 192, 384),
    stem_dim=24,
    head_dim=32,
    head_widths=(2304, 2560),
    drop_path=0.1,
    weights=_weights('efficientvit_b2', 1.0, 24, {224: (82.100, 1.6), 256: (82.698, 2.1), 288: (83.086, 2.6)}),
)
register(
    'efficientvit_cls_b3',
    EfficientViT,
    depths=(3, 5, 6, 9),
    dims=(64, 128, 256, 512),
    stem_dim=32,
    head_dim=32,
    head_widths=(2304, 2560),
    drop_path=0.1,
    weights=_weights('efficientvit_b3', 1.0, 49, {224: (83.468, 4.0), 256: (83.806, 5.2), 288: (84.150, 6.5)}),
)
register(
    'efficientvit_cls_l1',
    EfficientViT,
    depths=(1, 1, 6, 6),
    dims=(64, 128, 256, 512),
    stem_dim=32,
    head_widths=(3072, 3200),
    weights=_weights('efficientvit_l1', 1.0, 53, {224: (84.484, 5.3)}),
    **_LARGE,
)
register(
    'efficientvit_cls_l2',
    EfficientViT,
    depths=(2, 2, 8, 8),
    dims=(64, 128, 256, 512),
    stem_dim=32,
    head_widths=(3072, 3200),
    weights=_weights(
        'efficientvit_l2',
        1.0,
        64,
        {224: (85.050, 6.9), 256: (85.366, 9.1), 288: (85.630, 11), 320: (85.734, 14), 384: (85.978, 20)},
    ),
    **_LARGE,
)
