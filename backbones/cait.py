"""CaiT: Going deeper with Image Transformers, arXiv 2103.17239.

Written from the paper and the facts of the authors' code, https://github.com/facebookresearch/deit (Apache-2.0; the
weights carry the same licence). Blocks of talking-heads attention (arXiv 2003.02436) see patches alone; the class token
joins after them, in two blocks of class attention. Differs: other sizes and the dense form, which has neither class
token nor class attention, as in deit.py.
"""

# B batch, N tokens, C channels, H W size of the grid, h heads, d head width
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import rename
from .deit import ORIGIN, RENAMES, URL, DeiT
from .layers import Mlp, Scale, TokenBlock, build_token_mixer, norm_factory
from .layers.grid import grid_of
from .layers.linear import Linear
from .layers.norm import NormFactory
from .layers.patches import build_stem
from .layers.positions import PositionTable
from .layers.scale import fold_scale
from .layers.token_attention import TOKEN_MIXERS, HeadSplit, biased, scaled_products
from .plain import Plain, block_windows, check_plain
from .registry import register, weights


class TalkingHeads(HeadSplit):
    """Attention whose heads are mixed linearly before and after the softmax; (B, N, C) -> (B, N, C).

    out = W softmax(L (scale q . k) + l) + w applied to v, with (h, h) matrices L and W across the heads.
    """

    last_linear: ClassVar[str] = 'proj'
    first_linears: ClassVar[tuple[str, ...]] = ('qkv',)

    def __init__(self, *, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads must divide dim, got {num_heads=}, {dim=}')
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj_l = Linear(num_heads, num_heads)
        self.proj_w = Linear(num_heads, num_heads)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None) -> Tensor:
        """`bias` (broadcast to (B, h, N, N)) is added before the softmax, as logarithms of merged tokens' sizes are."""
        return self.join(self.attend(*self.split(x), bias), x)

    # ---- the steps, see `reduction.interface`

    any_tokens: ClassVar[bool] = True

    def weigh(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = self._mix(scaled_products(query, key, self.scale), self.proj_l)
        return self._mix(biased(logits, bias).softmax(-1), self.proj_w)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.weigh(query, key, bias) @ value

    def join(self, out: Tensor, x: Tensor) -> Tensor:
        return self.proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def _mix(x: Tensor, linear: nn.Linear) -> Tensor:
        """The linear layer across the heads of (B, h, N, M): a matrix product from the left, so that no head moves."""
        # on two threads 75 times as fast as the same 1x1 convolution, of few channels and many positions
        weight = linear.weight.expand(x.shape[0], -1, -1)
        return torch.baddbmm(linear.bias[:, None], weight, x.flatten(2)).view(x.shape)


TOKEN_MIXERS['talking_heads'] = TalkingHeads


class ClassAttention(nn.Module):
    """The class token attends to all tokens, itself included; (B, 1 + N, C) -> (B, 1, C)."""

    last_linear: ClassVar[str] = 'proj'

    def __init__(self, *, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.k = Linear(dim, dim, bias=qkv_bias)
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        parts = (self.q(x[:, :1]), self.k(x), self.v(x))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(B, 1, C))


class ClassBlock(nn.Module):
    """Class attention and an MLP for the class token alone, each with a learnable scale; patches stay as they are."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        norm: NormFactory,
        mlp_ratio: float,
        qkv_bias: bool,
        layer_scale: float,
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = ClassAttention(dim=dim, num_heads=num_heads, qkv_bias=qkv_bias)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim=dim, ratio=mlp_ratio)
        self.layer_scale1: Scale | None = Scale(dim, init=layer_scale)
        self.layer_scale2: Scale | None = Scale(dim, init=layer_scale)

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """The class token (B, 1, C), from itself and the patches (B, N, C)."""
        branch = self.attn(self.norm1(torch.cat((token, patches), 1)))
        token = token + (branch if self.layer_scale1 is None else self.layer_scale1(branch))
        branch = self.mlp(self.norm2(token))
        return token + (branch if self.layer_scale2 is None else self.layer_scale2(branch))

    def for_deploy(self) -> nn.Module:
        """The same block in evaluation mode, with its scales inside the last linear layers of its branches."""
        self.layer_scale1 = fold_scale(self.attn, self.layer_scale1)
        self.layer_scale2 = fold_scale(self.mlp, self.layer_scale2)
        return self


class CaiT(Plain):
    """Deep blocks of talking-heads attention for patches, then class attention.

    Args:
        depth, dim: blocks and channels.
        depth_token_only: blocks of class attention after them.
        num_heads: attention heads.
        patch_size: pixels of a patch's side, and their stride.
        mlp_ratio: width of the MLPs over dim.
        norm: normalisation throughout, by name.
        qkv_bias: learn a bias of queries, keys and values.
        token_mixer: by name; 'attention' is attention without talking heads, which takes windows.
        layer_scale: start value of the branches' learnable scales.
        window_size, global_blocks, pyramid_dim, pyramid_blocks, img_size: as in `DeiT`; talking heads take no windows.
        The others: see `Plain.assemble`. Stochastic depth is constant over the blocks, class attention has none.
    """

    drop_path_rises = False
    prefix_in_blocks = False
    classifier_keys = ('norm.', 'head.', 'cls_token', 'blocks_token_only.')
    cls_token: nn.Parameter

    def __init__(
        self,
        *,
        depth: int = 24,
        dim: int = 192,
        depth_token_only: int = 2,
        num_heads: int = 4,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        norm: str = 'layer',
        qkv_bias: bool = True,
        token_mixer: str = 'talking_heads',
        layer_scale: float = 1e-5,
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
        if window_size is not None and token_mixer == 'talking_heads':
            raise ValueError(f"talking heads take no windows, got {window_size=}; pass token_mixer='attention' too")
        make_norm = norm_factory(norm)
        blocks = [
            TokenBlock(
                dim=dim,
                norm=make_norm,
                attn=build_token_mixer(
                    token_mixer, dim=dim, num_heads=num_heads, qkv_bias=qkv_bias, window_size=window
                ),
                mlp=Mlp(dim=dim, ratio=mlp_ratio),
                drop_path=drop_path_rate,
                layer_scale=layer_scale,
            )
            for window in block_windows(depth, window_size, global_blocks)
        ]
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=build_stem('linear', in_chans=in_chans, dim=dim, patch_size=patch_size),
            position=PositionTable(dim, grid_of(img_size, patch_size), method=DeiT.resize_method),
            prefix=() if features_only else ('cls_token',),
            blocks=blocks,
            norm=make_norm,
            pooling='avg' if features_only else 'token',
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if not features_only:
            self.blocks_token_only = nn.ModuleList(
                ClassBlock(
                    dim=dim,
                    num_heads=num_heads,
                    norm=make_norm,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    layer_scale=layer_scale,
                )
                for _ in range(depth_token_only)
            )
        self.apply(self.init_weights)
        self.init_prefix()

    def finish(self, x: Tensor) -> Tensor:
        """The class token joins the patches."""
        if self.features_only:
            return x
        token = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            token = self._call(block, token, x)
        return super().finish(torch.cat((token, x), 1))

    def block_names(self) -> list[list[str]]:
        last = () if self.features_only else range(len(self.blocks_token_only))
        return [*super().block_names(), *([f'blocks_token_only.{i}'] for i in last)]

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, [(r'(blocks_token_only\.\d+)\.gamma_(\d)$', r'\1.layer_scale\2.scale'), *RENAMES])


_PAPER: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2103.17239', 'crop_pct': 1.0, **ORIGIN}


def _set(file: str, size: int, top1: float, params: float, macs: float) -> list[Any]:
    """The published set of a model, trained with distillation."""
    return [weights('fb_dist_in1k', f'{URL}{file}.pth', top1=top1, params=params, macs=macs, size=size, **_PAPER)]


# Figures of the models that the README leaves out (XXS24, XXS36, XS36) are the paper's.
_XXS: dict[str, Any] = {'dim': 192, 'num_heads': 4, 'drop_path': 0.05}
_XS: dict[str, Any] = {'dim': 288, 'num_heads': 6, 'drop_path': 0.05}
_S: dict[str, Any] = {'dim': 384, 'num_heads': 8}
_M: dict[str, Any] = {'dim': 768, 'num_heads': 16, 'layer_scale': 1e-6}

register('cait_xxs24_224', CaiT, depth=24, weights=_set('XXS24_224', 224, 77.6, 12.0, 2.5), **_XXS)
register('cait_xxs24_384', CaiT, depth=24, img_size=384, weights=_set('XXS24_384', 384, 80.4, 12.0, 9.5), **_XXS)
register('cait_xxs36_224', CaiT, depth=36, weights=_set('XXS36_224', 224, 79.1, 17.3, 3.8), **_XXS)
register('cait_xxs36_384', CaiT, depth=36, img_size=384, weights=_set('XXS36_384', 384, 81.8, 17.3, 14.2), **_XXS)
register('cait_xs24_384', CaiT, depth=24, img_size=384, weights=_set('XS24_384', 384, 84.1, 27, 19.3), **_XS)
register('cait_s24_224', CaiT, depth=24, drop_path=0.1, weights=_set('S24_224', 224, 83.5, 47, 9.4), **_S)
register(
    'cait_s24_384', CaiT, depth=24, img_size=384, drop_path=0.1, weights=_set('S24_384', 384, 85.1, 47, 32.2), **_S
)
register(
    'cait_s36_384',
    CaiT,
    depth=36,
    img_size=384,
    layer_scale=1e-6,
    drop_path=0.2,
    weights=_set('S36_384', 384, 85.4, 68, 48.0),
    **_S,
)
register(
    'cait_m36_384', CaiT, depth=36, img_size=384, drop_path=0.3, weights=_set('M36_384', 384, 86.1, 271, 173.3), **_M
)
register(
    'cait_m48_448', CaiT, depth=48, img_size=448, drop_path=0.4, weights=_set('M48_448', 448, 86.5, 356, 329.6), **_M
)
