"""T2T-ViT: Tokens-to-Token ViT, Training Vision Transformers from Scratch on ImageNet, arXiv 2101.11986.

Written from the paper and the facts of the authors' code, https://github.com/yitu-opensource/T2T-ViT (Clear BSD; the
weights carry the same licence). Differs: maps need not be square, other sizes are taken by the bicubic interpolation of
the position table that the authors use for transfer, and sizes that 16 does not divide are padded. The dense form is
ours: a simple feature pyramid.
"""

# B batch, N tokens, C channels, H W size of a map, k side of a split, m random features
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import full_precision
from .backbone import rename
from .layers import Mlp, TokenBlock, build_token_mixer, drop_path_schedule, norm_factory
from .layers.grid import grid_of, pad_bottom_right, to_last
from .layers.linear import Linear
from .layers.lookup import choose
from .layers.norm import NormFactory
from .layers.positions import PositionTable
from .plain import Plain, block_windows, check_plain
from .registry import register, weights


def soft_split(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Overlapping squares as tokens, (B, H, W, C) -> (B, h, w, C k k), ordered (channel, row, column)."""
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    return x.unfold(1, kernel, stride).unfold(2, kernel, stride).flatten(3)


class TokenPerformer(nn.Module):
    """One head of attention in linear time by random features; (B, N, C) -> (B, N, `dim`).

    out[i] = sum over j of (f(q[i]) . f(k[j])) v[j] / sum over j of f(q[i]) . f(k[j]), f(x) = exp(w x - |x|^2 / 2) /
    sqrt(m), with fixed random orthogonal w: an estimate of softmax attention, Performer, arXiv 2009.14794. The skip
    connection is from v, as the input has other channels.

    Args:
        in_dim: C.
        dim: channels after it.
        features: m.
        norm: makes the norms.
        dropout: after the projection and the MLP.
    """

    def __init__(self, *, in_dim: int, dim: int, norm: NormFactory, features: int | None = None, dropout: float = 0.0):
        super().__init__()
        features = dim // 2 if features is None else features
        self.norm1 = norm(in_dim)
        self.kqv = Linear(in_dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.norm2 = norm(dim)
        self.mlp = nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, dim), nn.Dropout(dropout))
        self.drop = nn.Dropout(dropout)
        self.w = nn.Parameter(torch.empty(features, dim), requires_grad=False)
        nn.init.orthogonal_(self.w, gain=math.sqrt(features))

    def forward(self, x: Tensor) -> Tensor:
        key, query, value = self.kqv(self.norm1(x)).chunk(3, -1)
        x = value + self.drop(self.proj(self._attend(query, key, value).to(value.dtype)))
        return x + self.mlp(self.norm2(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # sums of exponentials over all positions and a quotient of them: float32 under autocast too
        with full_precision(query):
            query, key = self._features(query.float()), self._features(key.float())
            total = query @ key.sum(1).unsqueeze(-1)  # (B, N, 1)
            return query @ (key.transpose(1, 2) @ value.float()) / (total + 1e-8)

    def _features(self, x: Tensor) -> Tensor:
        """f(x), (B, N, m)."""
        w = self.w.float()
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(w))


class TokenTransformer(nn.Module):
    """A block with one head of attention whose skip connection is from v; (B, N, C) -> (B, N, `dim`).

    Products are scaled by C ** -0.5, of the input's channels rather than the head's. Arguments: see `TokenPerformer`.
    """

    def __init__(self, *, in_dim: int, dim: int, norm: NormFactory, dropout: float = 0.0):
        super().__init__()
        self.scale = in_dim**-0.5
        self.norm1 = norm(in_dim)
        self.qkv = Linear(in_dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim=dim, ratio=1.0)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x))[:, None].chunk(3, -1)  # (B, 1, N, dim)
        out = self.proj(F.scaled_dot_product_attention(query, key, value, scale=self.scale))
        x = (value + self.drop(out))[:, 0]
        return x + self.drop(self.mlp(self.norm2(x)))


TOKEN_MODULES: dict[str, Any] = {'performer': TokenPerformer, 'transformer': TokenTransformer}


class TokensToToken(nn.Module):
    """Three soft splits with attention between them; (B, C, H, W) -> (B, ceil(H / 16), ceil(W / 16), dim).

    Args:
        in_channels: of the image.
        dim: channels of the tokens.
        token_dim: channels between the splits.
        tokens: 'performer' or 'transformer'.
        norm: makes their norms.
        dropout: within them.
    """

    def __init__(
        self, *, in_channels: int, dim: int, token_dim: int, tokens: str, norm: NormFactory, dropout: float = 0.0
    ):
        super().__init__()
        make = choose('tokens', tokens, TOKEN_MODULES)
        self.in_channels = in_channels
        self.attention1 = make(in_dim=in_channels * 7 * 7, dim=token_dim, norm=norm, dropout=dropout)
        self.attention2 = make(in_dim=token_dim * 3 * 3, dim=token_dim, norm=norm, dropout=dropout)
        self.project = Linear(token_dim * 3 * 3, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = soft_split(to_last(pad_bottom_right(x, 16)), 7, 4, 2)
        for attention in (self.attention1, self.attention2):
            x = attention(x.flatten(1, 2)).unflatten(1, (x.shape[1], x.shape[2]))
            x = soft_split(x, 3, 2, 1)
        return self.project(x)


def sinusoids(count: int, dim: int) -> Tensor:
    """(1, count, dim): sin(p / 10000^(2 floor(c / 2) / dim)) in even channels, cos of the same in odd ones."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class T2TViT(Plain):
    """Tokens from overlapping squares that attend to each other before they become patches, then a narrow, deep ViT.

    Args:
        depth, dim: blocks and channels.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs over dim.
        norm: normalisation throughout, by name.
        tokens: 'performer' or 'transformer', the attention between soft splits; the latter takes time and memory that
            grow with the square of H W / 16.
        token_dim: channels between soft splits.
        token_drop_rate: dropout between soft splits; the authors train performers with 0.1.
        token_mixer: of the blocks, by name or dict(name=..., option=...), see `layers.token_attention`.
        window_size: side of the windows that patches attend within, for large images in dense form; None for none.
        global_blocks: blocks without windows, four evenly spaced ones if None.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: height and width that positions are made for, 224 if None.
        The others: see `Plain.assemble`.
    """

    reduced: ClassVar[dict[str, Any]] = {'depth': 4, 'dim': 32, 'num_heads': 2, 'token_dim': 16}

    def __init__(
        self,
        *,
        depth: int = 14,
        dim: int = 384,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        norm: str = 'layer_eps5',
        tokens: str = 'performer',
        token_dim: int = 64,
        token_drop_rate: float = 0.0,
        token_mixer: str | dict[str, Any] = 'attention',
        window_size: int | None = None,
        global_blocks: Sequence[int] | None = None,
        pyramid_dim: int | None = None,
        pyramid_blocks: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        check_plain(depth=depth, dim=dim, patch_size=16)
        make_norm = norm_factory(norm)
        blocks = [
            TokenBlock(
                dim=dim,
                norm=make_norm,
                attn=build_token_mixer(
                    token_mixer, dim=dim, num_heads=num_heads, prefix=1, qkv_bias=False, window_size=window
                ),
                mlp=Mlp(dim=dim, ratio=mlp_ratio),
                drop_path=rate,
            )
            for window, rate in zip(
                block_windows(depth, window_size, global_blocks), drop_path_schedule([depth], drop_path_rate)[0]
            )
        ]
        position = PositionTable(dim, grid_of(img_size, 16), prefix=1, method='bicubic', trainable=False)
        position.table.data.copy_(sinusoids(position.table.shape[1], dim))
        self.assemble(
            dim=dim,
            stride=16,
            patch_embed=TokensToToken(
                in_channels=in_chans,
                dim=dim,
                token_dim=token_dim,
                tokens=tokens,
                norm=make_norm,
                dropout=token_drop_rate,
            ),
            position=position,
            prefix=('cls_token',),
            blocks=blocks,
            norm=make_norm,
            pooling='token',
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)
        self.init_prefix()

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, RENAMES)


RENAMES = [
    (r'pos_embed$', 'pos_embed.table'),
    (r'tokens_to_token\.(attention\d)\.attn\.', r'patch_embed.\1.'),
    (r'tokens_to_token\.', 'patch_embed.'),
]

_URL = 'https://github.com/yitu-opensource/T2T-ViT/releases/download/main/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2101.11986',
    'origin': 'https://github.com/yitu-opensource/T2T-ViT',
    'licence': 'bsd-3-clause-clear',
    'first_conv': 'patch_embed',
}
_LITE: dict[str, Any] = {'dim': 256, 'num_heads': 4, 'mlp_ratio': 2.0}

register(
    't2t_vit_7',
    T2TViT,
    depth=7,
    drop_path=0.1,
    weights=[weights('in1k', _URL + '71.7_T2T_ViT_7.pth.tar', top1=71.7, params=4.3, macs=1.1, **_PAPER)],
    **_LITE,
)
register(
    't2t_vit_10',
    T2TViT,
    depth=10,
    drop_path=0.1,
    weights=[weights('in1k', _URL + '75.2_T2T_ViT_10.pth.tar', top1=75.2, params=5.9, macs=1.5, **_PAPER)],
    **_LITE,
)
register(
    't2t_vit_12',
    T2TViT,
    depth=12,
    drop_path=0.1,
    weights=[weights('in1k', _URL + '76.5_T2T_ViT_12.pth.tar', top1=76.5, params=6.9, macs=1.8, **_PAPER)],
    **_LITE,
)
register(
    't2t_vit_14',
    T2TViT,
    depth=14,
    dim=384,
    num_heads=6,
    drop_path=0.1,
    weights=[weights('in1k', _URL + '81.5_T2T_ViT_14.pth.tar', top1=81.5, params=21.5, macs=4.8, **_PAPER)],
)
register(
    't2t_vit_14_384',
    T2TViT,
    depth=14,
    dim=384,
    num_heads=6,
    img_size=384,
    drop_path=0.1,
    weights=[weights('in1k', _URL + '83.3_T2T_ViT_14.pth.tar', top1=83.3, params=21.7, macs=None, size=384, **_PAPER)],
)
register(
    't2t_vit_19',
    T2TViT,
    depth=19,
    dim=448,
    num_heads=7,
    drop_path=0.1,
    weights=[weights('in1k', _URL + '81.9_T2T_ViT_19.pth.tar', top1=81.9, params=39.2, macs=8.5, **_PAPER)],
)
register(
    't2t_vit_24',
    T2TViT,
    depth=24,
    dim=512,
    num_heads=8,
    drop_path=0.1,
    weights=[weights('in1k', _URL + '82.3_T2T_ViT_24.pth.tar', top1=82.3, params=64.1, macs=13.8, **_PAPER)],
)
register(
    't2t_vit_t_14',
    T2TViT,
    depth=14,
    dim=384,
    num_heads=6,
    tokens='transformer',
    drop_path=0.1,
    weights=[weights('in1k', _URL + '81.7_T2T_ViTt_14.pth.tar', top1=81.7, params=21.5, macs=6.1, **_PAPER)],
)
register(
    't2t_vit_t_19',
    T2TViT,
    depth=19,
    dim=448,
    num_heads=7,
    tokens='transformer',
    drop_path=0.1,
    weights=[weights('in1k', _URL + '82.4_T2T_ViTt_19.pth.tar', top1=82.4, params=39.2, macs=9.8, **_PAPER)],
)
register(
    't2t_vit_t_24',
    T2TViT,
    depth=24,
    dim=512,
    num_heads=8,
    tokens='transformer',
    drop_path=0.1,
    weights=[weights('in1k', _URL + '82.6_T2T_ViTt_24.pth.tar', top1=82.6, params=64.1, macs=15.0, **_PAPER)],
)
# in the authors' code, without weights: parameters are counted
register(
    't2t_vit_14_resnext',
    T2TViT,
    depth=14,
    dim=384,
    num_heads=32,
    drop_path=0.1,
    weights=[weights('in1k', None, top1=None, params=21.5, macs=None, **_PAPER)],
)
register(
    't2t_vit_14_wide',
    T2TViT,
    depth=4,
    dim=768,
    num_heads=12,
    drop_path=0.1,
    weights=[weights('in1k', None, top1=None, params=25.2, macs=None, **_PAPER)],
)
