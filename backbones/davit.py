"""DaViT: Dual Attention Vision Transformers, arXiv 2204.03645.

Written from the paper and the facts of the authors' code, https://github.com/dingmyu/davit (MIT). Differs: a pair of
blocks, spatial and channel, is two places of a stage, so `stages.{s}.{2 * u}` is the authors' main_blocks.{s}.{u}.0.
"""

import itertools
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..kernels import window_attention
from .layers import ConvDownsample, Mlp, drop_path_schedule, mixer, norm_factory
from .layers.grid import to_first
from .layers.linear import Linear
from .layers.norm import NormFactory
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage


# B batch, C channels, H W size of the current stage, N = H * W, h heads, d head width, w window
def heads_for(dim: int, num_heads: int | None) -> int:
    """The number of heads, by default of 32 channels each.

    Raises:
        ValueError: it does not divide `dim`.
    """
    heads = max(dim // 32, 1) if num_heads is None else num_heads
    if heads < 1 or dim % heads:
        raise ValueError(f'num_heads must divide the channels, got {num_heads=}, {dim=}')
    return heads


@mixer('plain_window')
class WindowAttention(nn.Module):
    """Attention inside w x w windows, unshifted and without position bias; padded positions carry the bias of qkv."""

    def __init__(self, *, dim: int, num_heads: int | None = None, window_size: int = 7, qkv_bias: bool = True):
        super().__init__()
        if window_size < 1:
            raise ValueError(f'window_size must be positive, got {window_size=}')
        self.num_heads, self.window_size = heads_for(dim, num_heads), window_size
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        outside = self.qkv.bias if self.qkv.bias is not None else qkv.new_zeros(qkv.shape[-1])
        return self.proj(window_attention(qkv, self.window_size, heads=self.num_heads, outside=outside))


@mixer('channel')
class ChannelAttention(nn.Module):
    """Attention between the channels of each head, over all positions of the map.

    out = q A^T with A = softmax(d^-0.5 k^T v), d x d: keys and values make the map, the queries are mixed.
    """

    def __init__(self, *, dim: int, num_heads: int | None = None, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = heads_for(dim, num_heads)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        d = C // self.num_heads
        query, key, value = self.qkv(x).reshape(B, H * W, 3, self.num_heads, d).permute(2, 0, 3, 1, 4)
        scores = torch.matmul((key * d**-0.5).transpose(-1, -2), value)  # (B, h, d, d)
        out = torch.matmul(query, scores.softmax(-1).transpose(-1, -2))
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C))


class PositionEncoding(nn.Module):
    """x plus a 3x3 depthwise convolution of x."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(to_first(x)).permute(0, 2, 3, 1)


class DaViTBlock(nn.Module):
    """Position encoding, attention, position encoding, MLP; attention and MLP are residual branches with norms."""

    def __init__(self, *, dim: int, attention: nn.Module, norm: NormFactory, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.cpe = nn.ModuleList(PositionEncoding(dim) for _ in range(2))
        self.norm1 = norm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim=dim, ratio=mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DaViT(Hierarchical):
    """Blocks of window attention and of channel attention in turn.

    Args:
        depths: pairs of blocks of each stage.
        dims: channels of each stage.
        num_heads: of both kinds of attention, one number for all stages or one per stage; None for 32 channels each.
        window_size: side of the windows, one for all stages or one per stage.
        mlp_ratio: width of the MLPs over that of the stage.
        qkv_bias: whether query, key and value have biases.
        norm: normalisation throughout, by name.
        attention_types: what takes turns in each of `depths`, of 'spatial' and 'channel'.
        img_size: not needed.
        The others: see `Hierarchical.assemble`.
    """

    reduced = {'depths': (1, 1, 2, 1), 'dims': (32, 64, 96, 128), 'num_heads': (1, 2, 3, 4), 'window_size': 3}

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 1, 3, 1),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: int | Sequence[int] | None = None,
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm: str = 'layer_eps5',
        attention_types: Sequence[str] = ('spatial', 'channel'),
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
        make_norm = norm_factory(norm)
        turns = tuple(attention_types)
        if not turns or not {'spatial', 'channel'}.issuperset(turns):
            raise ValueError(f"attention_types must be of 'spatial' and 'channel', got {attention_types=}")

        def attention(turn: str, dim: int, heads: int | None, side: int) -> nn.Module:
            if turn == 'spatial':
                return WindowAttention(dim=dim, num_heads=heads, window_size=side, qkv_bias=qkv_bias)
            return ChannelAttention(dim=dim, num_heads=heads, qkv_bias=qkv_bias)

        stages = [
            [
                DaViTBlock(
                    dim=dim,
                    attention=attention(turn, dim, heads, side),
                    norm=make_norm,
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                )
                for rate, turn in zip(rates, itertools.cycle(turns))
            ]
            for dim, heads, side, rates in zip(
                dims,
                per_stage('num_heads', num_heads),
                per_stage('window_size', window_size),
                drop_path_schedule([len(turns) * depth for depth in depths], drop_path_rate),
            )
        ]
        stem = ConvDownsample(in_chans, dims[0], kernel=7, stride=4, padding=3, post_norm=make_norm, image=True)
        downsample = partial(ConvDownsample, kernel=2, stride=2, padding=0, pre_norm=make_norm)
        self.assemble(
            dims=dims,
            downsamplings=[stem, *(downsample(a, b) for a, b in itertools.pairwise(dims))],
            stages=stages,
            output_norm=make_norm,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers as the authors'; convolutions keep PyTorch's own initialisation, as theirs do."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, whose blocks are numbered by stage, pair and place in the pair."""
        return {_new_name(key): value for key, value in state.items()}


def _new_name(key: str) -> str:
    if found := re.match(r'main_blocks\.(\d+)\.(\d+)\.(\d+)\.', key):
        stage, pair, place = map(int, found.groups())
        return f'stages.{stage}.{2 * pair + place}.{key[found.end() :]}'
    if found := re.match(r'patch_embeds\.(\d+)\.(proj|norm)\.', key):
        norm = 'post_norm' if found[1] == '0' else 'pre_norm'
        return f'downsample_layers.{found[1]}.{"conv" if found[2] == "proj" else norm}.{key[found.end() :]}'
    return re.sub(r'^norms\.', 'norm.', re.sub(r'^norm(\d)\.', r'output_norms.\1.', key))


_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2204.03645',
    'origin': 'https://github.com/dingmyu/davit',
    'page': 'https://github.com/dingmyu/davit#benchmarking',
    'licence': 'mit',
}

register(
    'davit_tiny',
    DaViT,
    depths=(1, 1, 3, 1),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    drop_path=0.1,
    weights=[weights('in1k', None, top1=82.8, params=28.3, macs=4.5, **_PAPER)],
)
register(
    'davit_small',
    DaViT,
    depths=(1, 1, 9, 1),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    drop_path=0.2,
    weights=[weights('in1k', None, top1=84.2, params=49.7, macs=8.8, **_PAPER)],
)
register(
    'davit_base',
    DaViT,
    depths=(1, 1, 9, 1),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    drop_path=0.4,
    weights=[weights('in1k', None, top1=84.6, params=87.9, macs=15.5, **_PAPER)],
)
