"""TNT: Transformer in Transformer, arXiv 2103.00112.

Written from the paper and the facts of the authors' code,
https://github.com/huawei-noah/Efficient-AI-Backbones/tree/master/tnt_pytorch (Apache-2.0; the weights carry the same
licence). Differs: other image sizes than the one that positions were made for are taken, by bicubic interpolation;
sizes that patches do not divide are padded. `outer_tokens`, a parameter that the authors' code saves and never reads,
is kept frozen, so that keys and counts are theirs. The dense form is ours: a simple feature pyramid over the patches.
"""

# B batch, N patches, M words of a patch, C channels of patches, c of words, H W size of the grid, h heads, P prefix
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..kernels import linear, window_attention
from .backbone import rename
from .layers import Mlp, drop_path_schedule, norm_factory
from .layers.grid import grid_of, pad_bottom_right
from .layers.linear import Linear
from .layers.norm import NormFactory
from .layers.positions import PositionTable
from .plain import Grid, Plain, block_windows, check_plain
from .registry import Weights, register, weights

WORD_STRIDE = 4  # pixels between words


class SplitAttention(nn.Module):
    """Self-attention with one layer for queries and keys and one for values; (B, N, C) -> (B, N, C).

    Args:
        dim: channels.
        num_heads: divides dim.
        window_size: side of the windows that patches attend within, behind one prefix token that attends to all tokens;
            None for all tokens.
    """

    def __init__(self, *, dim: int, num_heads: int, window_size: int | None = None):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads must divide dim, got {num_heads=}, {dim=}')
        self.num_heads, self.window_size = num_heads, window_size
        self.qk = Linear(dim, 2 * dim, bias=False)
        self.v = Linear(dim, dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """`grid` is that of the patches, read by windows alone."""
        # one product with both weights side by side: they are small next to x
        qkv = linear(x, torch.cat((self.qk.weight, self.v.weight)))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.window_size is None or grid is None:
            return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        first = F.scaled_dot_product_attention(query[:, :, :1], key, value).transpose(1, 2).flatten(2)
        patches = window_attention(qkv[:, 1:].unflatten(1, grid), self.window_size, heads=self.num_heads)
        return self.proj(torch.cat((first, patches.flatten(1, 2)), 1))


class Gate(nn.Module):
    """x + x * g, with g from -1 to 1 per channel from the mean of the tokens; squeeze and excitation."""

    def __init__(self, dim: int, *, norm: NormFactory):
        super().__init__()
        self.fc = nn.Sequential(norm(dim), Linear(dim, dim // 4), nn.ReLU(), Linear(dim // 4, dim), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, x, self.fc(x.mean(1, keepdim=True)))


class TNTBlock(nn.Module):
    """Words of each patch attend to each other, are added to their patch, then patches attend to each other.

    Args:
        dim, num_heads: of the patches.
        inner_dim, inner_heads: of the words.
        words: M.
        norm: makes the norms.
        mlp_ratio: width of both MLPs over their channels.
        se: gate the outer MLP's output.
        drop_path: probability of dropping a branch while training.
        window_size: see `SplitAttention`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        inner_dim: int,
        inner_heads: int,
        words: int,
        norm: NormFactory,
        mlp_ratio: float = 4.0,
        se: bool = False,
        drop_path: float = 0.0,
        window_size: int | None = None,
    ):
        super().__init__()
        self.inner_norm1 = norm(inner_dim)
        self.inner_attn = SplitAttention(dim=inner_dim, num_heads=inner_heads)
        self.inner_norm2 = norm(inner_dim)
        self.inner_mlp = Mlp(dim=inner_dim, ratio=mlp_ratio)
        self.proj_norm1 = norm(words * inner_dim)
        self.proj = Linear(words * inner_dim, dim, bias=False)
        self.proj_norm2 = norm(dim)
        self.outer_norm1 = norm(dim)
        self.outer_attn = SplitAttention(dim=dim, num_heads=num_heads, window_size=window_size)
        self.outer_norm2 = norm(dim)
        self.outer_mlp = Mlp(dim=dim, ratio=mlp_ratio)
        self.se_layer = Gate(dim, norm=norm) if se else None
        self.drop_path = DropPath(drop_path)

    def forward(self, patches: Tensor, words: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Patches (B, P + N, C) and words (B N, M, c), both as they came."""
        words = words + self.drop_path(self.inner_attn(self.inner_norm1(words)))
        words = words + self.drop_path(self.inner_mlp(self.inner_norm2(words)))
        B, tokens, _ = patches.shape
        sentences = self.proj_norm2(self.proj(self.proj_norm1(words.reshape(B, tokens - 1, -1))))
        patches = patches + F.pad(sentences, (0, 0, 1, 0))
        patches = patches + self.drop_path(self.outer_attn(self.outer_norm1(patches), grid))
        branch = self.outer_mlp(self.outer_norm2(patches))
        return patches + self.drop_path(branch if self.se_layer is None else self.se_layer(branch)), words


class WordEmbed(nn.Module):
    """Words of every patch, (B, C, H, W) -> (B N, M, c): a 7x7 convolution of stride 4 that sees zeros, not pixels of
    the neighbours, beyond its patch."""

    def __init__(self, in_chans: int, dim: int, *, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, 7, WORD_STRIDE, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = pad_bottom_right(x, self.patch_size)
        B, C, height, width = x.shape
        p = self.patch_size
        grid = (height // p, width // p)
        x = x.reshape(B, C, grid[0], p, grid[1], p).permute(0, 2, 4, 1, 3, 5)
        x = self.proj(x.reshape(B * grid[0] * grid[1], C, p, p))
        return x.flatten(2).transpose(1, 2), grid


class TNT(Plain):
    """Patches as sentences of words: an inner transformer within every patch, an outer one between patches.

    Args:
        depth, dim: blocks and channels of patches.
        num_heads: attention heads between patches.
        inner_dim, inner_heads: channels and heads of words.
        patch_size: pixels of a patch's side, and their stride; a multiple of 4.
        mlp_ratio: width of the MLPs over their channels.
        norm: normalisation throughout, by name.
        se: gate the outer MLPs' output by squeeze and excitation.
        window_size: side of the windows that patches attend within, for large images in dense form; None for none.
        global_blocks: blocks without windows, four evenly spaced ones if None.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: height and width that positions are made for, 224 if None.
        The others: see `Plain.assemble`.
    """

    stem_keys = (*Plain.stem_keys, 'inner_pos', 'outer_tokens', 'proj_norm1.', 'proj.', 'proj_norm2.')
    reduced: ClassVar[dict[str, Any]] = {'depth': 4, 'dim': 32, 'num_heads': 2, 'inner_dim': 8, 'inner_heads': 2}

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 384,
        num_heads: int = 6,
        inner_dim: int = 24,
        inner_heads: int = 4,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        norm: str = 'layer_eps5',
        se: bool = False,
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
        if patch_size % WORD_STRIDE:
            raise ValueError(f'patch_size must be a multiple of {WORD_STRIDE}, got {patch_size=}')
        words = (patch_size // WORD_STRIDE) ** 2
        make_norm = norm_factory(norm)
        position = PositionTable(dim, grid_of(img_size, patch_size), prefix=1, method='bicubic')
        blocks = [
            TNTBlock(
                dim=dim,
                num_heads=num_heads,
                inner_dim=inner_dim,
                inner_heads=inner_heads,
                words=words,
                norm=make_norm,
                mlp_ratio=mlp_ratio,
                se=se,
                drop_path=rate,
                window_size=window,
            )
            for window, rate in zip(
                block_windows(depth, window_size, global_blocks), drop_path_schedule([depth], drop_path_rate)[0]
            )
        ]
        self.inner_pos = nn.Parameter(torch.zeros(1, words, inner_dim))
        self.outer_tokens = nn.Parameter(torch.zeros(1, position.table.shape[1] - 1, dim), requires_grad=False)
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=WordEmbed(in_chans, inner_dim, patch_size=patch_size),
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
        self.proj_norm1 = make_norm(words * inner_dim)
        self.proj = Linear(words * inner_dim, dim)
        self.proj_norm2 = make_norm(dim)
        self.apply(self.init_weights)
        self.init_prefix()
        nn.init.trunc_normal_(self.inner_pos, std=0.02)

    def embed(self, x: Tensor) -> tuple[Any, Grid]:
        """Patches (B, 1 + N, C) beside words (B N, M, c), and the grid of the patches."""
        words, grid = self.patch_embed(x)
        words = words + self.inner_pos
        patches = self.proj_norm2(self.proj(self.proj_norm1(words.reshape(x.shape[0], grid[0] * grid[1], -1))))
        first, positions = self.pos_embed(grid)  # type: ignore[misc]
        token = (self.cls_token + first).expand(x.shape[0], -1, -1)
        return (torch.cat((token, patches + positions), 1), words), grid

    def run_blocks(
        self, x: Any, grid: Grid, wanted: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        patches, words = x
        kept = []
        for i, block in enumerate(self.blocks):
            patches, words = self._call(block, patches, words, grid)
            if i in wanted:
                kept.append(patches)
            if i == last:
                break
        return patches, kept

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), 'inner_pos'}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, [(r'outer_pos$', 'pos_embed.table')])

    def resample(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for this image size; nothing reads `outer_tokens`, so ours stay as they are."""
        if 'outer_tokens' in state:
            state['outer_tokens'] = self.outer_tokens.detach()
        return super().resample(state)


def half_weights(tag: str, url: str | None, **facts: Any) -> Weights:
    """As `registry.weights`, for images whose mean and standard deviation are 0.5."""
    described = weights(tag, url, **facts)
    half = (0.5, 0.5, 0.5)
    return replace(described, cfg=replace(described.cfg, mean=half, std=half))


ORIGIN: dict[str, Any] = {
    'origin': 'https://github.com/huawei-noah/Efficient-AI-Backbones/tree/master/tnt_pytorch',
}
_PAPER: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2103.00112', 'first_conv': 'patch_embed.proj', **ORIGIN}
_URL = 'https://github.com/huawei-noah/Efficient-AI-Backbones/releases/download/tnt/'

# the paper's table of results; no weights were published, and the authors' code does not name the model
register(
    'tnt_ti_patch16_224',
    TNT,
    dim=192,
    num_heads=3,
    inner_dim=12,
    inner_heads=2,
    drop_path=0.1,
    weights=[half_weights('in1k', None, top1=73.9, params=6.1, macs=1.4, **_PAPER)],
)
register(
    'tnt_s_patch16_224',
    TNT,
    dim=384,
    num_heads=6,
    inner_dim=24,
    inner_heads=4,
    drop_path=0.1,
    weights=[half_weights('in1k', _URL + 'tnt_s_81.5.pth.tar', top1=81.5, params=23.8, macs=5.2, **_PAPER)],
)
register(
    'tnt_b_patch16_224',
    TNT,
    dim=640,
    num_heads=10,
    inner_dim=40,
    inner_heads=4,
    drop_path=0.1,
    weights=[half_weights('in1k', _URL + 'tnt_b_82.9.pth.tar', top1=82.9, params=65.6, macs=14.1, **_PAPER)],
)
