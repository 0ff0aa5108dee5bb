"""DHVT: Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets, arXiv
2210.05958.

Written from the paper and the facts of the authors' code, https://github.com/ArieSeirack/DHVT (Apache-2.0; no weights
were published). Differs: images need not be square, and patches may be any power of two; batch norm is that of one
process (theirs is synchronised in the stem). The published models of CIFAR and DomainNet have 100 and 345 classes
(`num_classes`). The dense form is ours.
"""

# B batch, N tokens, C channels, H W size of the grid, h heads, d head width
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .backbone import rename
from .layers import TokenAttention, drop_path_schedule, norm_factory
from .layers.conv import ConvNorm
from .layers.grid import to_first, to_last
from .layers.linear import Linear
from .layers.norm import NormFactory
from .plain import Plain, block_windows, check_plain
from .registry import register, weights
from .sizes import AnySize


class Affine(nn.Module):
    """alpha * x + beta per channel of (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, x, self.alpha)


class OverlappingPatches(nn.Module):
    """Sequential overlapping patch embedding: 3x3 convolutions of stride 2 with batch norm, GELU between them, inside
    affine maps; (B, C, H, W) -> (B, H / patch_size, W / patch_size, dim). Patches of 2 have a GELU after the one
    convolution.

    Args:
        in_chans, dim: channels; they double from one convolution to the next.
        patch_size: a power of two.
    """

    def __init__(self, in_chans: int, dim: int, *, patch_size: int):
        super().__init__()
        layers = patch_size.bit_length() - 1
        if layers < 1 or patch_size & (patch_size - 1) or dim % (patch_size // 2):
            raise ValueError(
                f'patch_size must be a power of two from 2 on whose half divides dim, got {patch_size=}, {dim=}'
            )
        widths = [in_chans, *(dim >> (layers - 1 - i) for i in range(layers))]
        self.pre_affine = Affine(in_chans)
        self.convs = nn.ModuleList(
            ConvNorm(
                widths[i], widths[i + 1], kernel=3, stride=2, act='gelu' if i < layers - 1 or layers == 1 else None
            )
            for i in range(layers)
        )
        self.post_affine = Affine(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_affine(x)
        for conv in self.convs:
            x = conv(x)
        return to_last(self.post_affine(x))


class HeadInteractingAttention(TokenAttention):
    """Attention with h more tokens, one made from each head's slice of the mean of all; what they gather joins the
    class token.

    Args:
        dim, num_heads, qkv_bias, window_size, key_drop, attn_drop: as in `TokenAttention`; head tokens stay out of
            windows like the class token, and their keys are never dropped.
    """

    first_linears = ()

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        window_size: int | None = None,
        key_drop: float = 0.0,
        attn_drop: float = 0.0,
    ):
        super().__init__(
            dim=dim,
            num_heads=num_heads,
            prefix=1 + num_heads,
            qkv_bias=qkv_bias,
            window_size=window_size,
            key_drop=key_drop,
            attn_drop=attn_drop,
        )
        self.first_linears = ()
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, dim))
        self.ht_proj = Linear(dim // num_heads, dim)
        self.ht_norm = nn.LayerNorm(dim // num_heads)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None, outputs: int | None = None
    ) -> Tensor:
        """(B, 1 + H W, C) -> the same, or its first `outputs`; `bias` as in `TokenAttention`, (B, 1, 1, 1 + H W)."""
        slices = x.mean(1).unflatten(-1, (self.num_heads, -1))  # (B, h, d)
        parts = self.ht_proj(slices).unflatten(-1, (self.num_heads, -1))  # (B, h, h, d)
        heads = F.gelu(self.ht_norm(parts)).flatten(2) + self.pos_embed
        if bias is not None:
            bias = torch.cat((bias[..., :1], bias.new_zeros(*bias.shape[:-1], self.num_heads), bias[..., 1:]), -1)
        if outputs is not None:
            outputs += self.num_heads  # the heads' own tokens
        out = super().forward(torch.cat((x[:, :1], heads, x[:, 1:]), 1), grid, bias, outputs)
        token = out[:, :1] + out[:, 1 : self.prefix].mean(1, keepdim=True)
        return torch.cat((token, out[:, self.prefix :]), 1)


class DynamicFeedForward(nn.Module):
    """Dynamic aggregation feed-forward: an inverted bottleneck of convolutions for the patches, whose mean gives the
    factors that the class token is multiplied by; (B, 1 + H W, C) -> the same.

    Args:
        dim: channels.
        ratio: hidden width over dim.
        aggregate: without it the class token's branch is 0, where nothing reads it any more.
    """

    def __init__(self, *, dim: int, ratio: float = 4.0, aggregate: bool = True):
        super().__init__()
        hidden = int(dim * ratio)
        self.conv1 = ConvNorm(dim, hidden, bias=True, act='gelu')
        self.conv2 = ConvNorm(hidden, hidden, kernel=3, groups=hidden, bias=True, act='gelu')
        self.conv3 = ConvNorm(hidden, dim, bias=True)
        self.compress = Linear(dim, dim // 4) if aggregate else None
        self.excitation = Linear(dim // 4, dim) if aggregate else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = self.conv1(to_first(x[:, 1:].unflatten(1, grid)))
        maps = self.conv3(maps + self.conv2(maps))
        patches = maps.permute(0, 2, 3, 1).flatten(1, 2)
        token = x[:, :1]
        if self.compress is None or self.excitation is None:
            token = torch.zeros_like(token)
        else:
            token = token * self.excitation(F.gelu(self.compress(patches.mean(1, keepdim=True))))
        return torch.cat((token, patches), 1)


class DHVTBlock(nn.Module):
    """x = x + attn(norm1(x)), x = x + mlp(norm2(x)); both see the grid.

    Args:
        dim: channels.
        norm: makes a normalisation for a number of channels.
        attn, mlp: (x, grid) -> (B, 1 + H W, C).
        drop_path: probability of dropping a branch for an image while training.
    """

    def __init__(self, *, dim: int, norm: NormFactory, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid, bias))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class DHVT(Plain):
    """Overlapping patches, attention with head tokens, convolutional feed-forward; no positions of patches.

    Args:
        depth, dim: blocks and channels.
        num_heads: attention heads.
        patch_size: 2, 4, 8, 16 or another power of two.
        mlp_ratio: hidden width of the feed-forward over dim.
        qkv_bias: learn a bias of queries, keys and values.
        norm: normalisation of the blocks, by name.
        window_size: side of the windows that patches attend within, for large images in dense form; None for none.
        global_blocks: blocks without windows, four evenly spaced ones if None.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: not needed, any size is taken.
        The others: see `Plain.assemble`.
    """

    sizes = AnySize()
    reduced = {**Plain.reduced, 'depth': 3, 'patch_size': 8}

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 192,
        num_heads: int = 3,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm: str = 'layer',
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
        check_plain(depth=depth, dim=dim, patch_size=patch_size)
        make_norm = norm_factory(norm)
        rates = drop_path_schedule([depth], drop_path_rate)[0]
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=OverlappingPatches(in_chans, dim, patch_size=patch_size),
            position=None,
            prefix=('cls_token',),
            blocks=[
                DHVTBlock(
                    dim=dim,
                    norm=make_norm,
                    attn=HeadInteractingAttention(dim=dim, num_heads=num_heads, qkv_bias=qkv_bias, window_size=window),
                    # after the last block the dense form reads patches alone
                    mlp=DynamicFeedForward(dim=dim, ratio=mlp_ratio, aggregate=not features_only or i < depth - 1),
                    drop_path=rate,
                )
                for i, (window, rate) in enumerate(zip(block_windows(depth, window_size, global_blocks), rates))
            ],
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
        if features_only:
            last = f'blocks.{depth - 1}.mlp.'
            self.classifier_keys = (*type(self).classifier_keys, f'{last}compress.', f'{last}excitation.')  # type: ignore[misc]
        self.apply(self.init_weights)
        self.init_prefix()

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names; their stems count activations too."""
        stem = [(rf'patch_embed\.proj\.{2 * i}\.', f'patch_embed.proj.{i}.') for i in range(1, 8)]
        return rename(rename(state, stem), _RENAMES)

    def resample(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Before another number of image channels, the first affine map takes the mean of the given ones."""
        for name in ('alpha', 'beta'):
            given = state.get(f'patch_embed.pre_affine.{name}')
            if given is not None and given.ndim == 4 and given.shape[1] != self.in_chans:
                mean = given.mean(1, keepdim=True).expand(-1, self.in_chans, -1, -1)
                state[f'patch_embed.pre_affine.{name}'] = mean.clone()
        return super().resample(state)


_RENAMES = [
    (r'patch_embed\.proj\.(\d+)\.0\.', r'patch_embed.convs.\1.conv.'),
    (r'patch_embed\.proj\.(\d+)\.1\.', r'patch_embed.convs.\1.norm.'),
    (r'blocks\.(\d+)\.mlp\.conv(\d)\.(weight|bias)$', r'blocks.\1.mlp.conv\2.conv.\3'),
    (r'blocks\.(\d+)\.mlp\.bn(\d)\.', r'blocks.\1.mlp.conv\2.norm.'),
]


def _weights(tag: str, params: float, macs: float | None = None, top1: float | None = None, **cfg: Any) -> list[Any]:
    """A model whose weights were never released; params without published figure are counted."""
    return [
        weights(
            tag,
            None,
            top1=top1,
            params=params,
            macs=macs,
            crop_pct=0.875,
            paper='https://arxiv.org/abs/2210.05958',
            origin='https://github.com/ArieSeirack/DHVT',
            first_conv='patch_embed.convs.0.conv',
            **cfg,
        )
    ]


_CIFAR: dict[str, Any] = {'size': 32, 'num_classes': 100}
_TINY: dict[str, Any] = {'dim': 192, 'drop_path': 0.1}
_SMALL: dict[str, Any] = {'dim': 384, 'drop_path': 0.1}

# The README gives the small model of ImageNet 23.8 million parameters, the paper's abstract 24.0; there too: 85.68 on
# CIFAR-100 for the small model with patches of 2.
register(
    'dhvt_tiny_cifar_patch4', DHVT, num_heads=4, patch_size=4, weights=_weights('cifar100', 6.0, **_CIFAR), **_TINY
)
register(
    'dhvt_small_cifar_patch4', DHVT, num_heads=8, patch_size=4, weights=_weights('cifar100', 23.4, **_CIFAR), **_SMALL
)
register(
    'dhvt_tiny_cifar_patch2', DHVT, num_heads=4, patch_size=2, weights=_weights('cifar100', 5.8, **_CIFAR), **_TINY
)
register(
    'dhvt_small_cifar_patch2', DHVT, num_heads=8, patch_size=2, weights=_weights('cifar100', 22.8, **_CIFAR), **_SMALL
)
register('dhvt_tiny_domain_patch16', DHVT, num_heads=4, weights=_weights('domainnet', 6.1, num_classes=345), **_TINY)
register('dhvt_small_domain_patch16', DHVT, num_heads=6, weights=_weights('domainnet', 23.8, num_classes=345), **_SMALL)
register('dhvt_tiny_imagenet_patch16', DHVT, num_heads=3, weights=_weights('in1k', 6.2, 1.4, 77.6), **_TINY)
register('dhvt_small_imagenet_patch16', DHVT, num_heads=6, weights=_weights('in1k', 24.0, 5.1, 82.3), **_SMALL)
