"""PyramidTNT: Improved Transformer-in-Transformer Baselines with Pyramid Architecture, arXiv 2201.00978.

Written from the paper and the facts of the authors' code,
https://github.com/huawei-noah/Efficient-AI-Backbones/tree/master/tnt_pytorch (Apache-2.0; the weights carry the same
licence). Differs: other image sizes than the one that positions were made for are taken, by bicubic interpolation of
positions, and of the biases along both of their maps; sizes that a stride does not divide are padded, and averages of
keys and values at a border are those of the positions that are there. The dense form is ours, see stride8.py: it leaves
out the last stage, of stride 64.
"""

# B batch, N sentences, M = 16 words of a sentence, C channels of sentences, c of words, H W size of the map, h heads
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..kernels.precision import full_precision
from .layers import Mlp, drop_path_schedule, norm_factory
from .layers.grid import ceil_div, grid_of, pad_bottom_right, padded, to_first, to_last
from .layers.linear import Linear
from .layers.norm import NormFactory
from .layers.positions import PositionTable
from .layers.resize import resize_matrix, same_size
from .plain import Grid
from .registry import register
from .sizes import Resampled
from .skeleton import check_stages, per_stage, rename
from .stride8 import FromStride8
from .tnt import ORIGIN, half_weights

SIDE = 4  # words along each side of a sentence
WORDS = SIDE * SIDE


class PairTable(nn.Module):
    """A learned bias for each head, query and key, (1, h, H W, H' W'), resized bicubically for maps of other sizes.

    Args:
        num_heads: h.
        grid: (H, W) of the queries that the table is made for.
        reduction: of the keys' map; H' and W' are rounded up.
    """

    def __init__(self, num_heads: int, grid: Grid, reduction: int):
        super().__init__()
        self.grid, self.reduction = grid, reduction
        self.keys = (ceil_div(grid[0], reduction), ceil_div(grid[1], reduction))
        self.table = nn.Parameter(torch.randn(1, num_heads, grid[0] * grid[1], self.keys[0] * self.keys[1]))

    def forward(self, grid: Grid) -> Tensor:
        """(1, h, N, N') for a map of this size."""
        if same_size(grid, self.grid):
            return self.table
        return resize_pairs(self.table, self.grid, self.keys, grid, self._keys_of(grid))

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Resizes a checkpoint's table, made for a square map, for this map."""
        table = state.get(prefix + 'table')
        if not isinstance(table, Tensor) or table.shape == self.table.shape:
            return
        side = round(table.shape[2] ** 0.5)
        old = (side, side)
        if side * side == table.shape[2] and ceil_div(side, self.reduction) ** 2 == table.shape[3]:
            state[prefix + 'table'] = resize_pairs(table, old, self._keys_of(old), self.grid, self.keys)

    def _keys_of(self, grid: Grid) -> Grid:
        return ceil_div(grid[0], self.reduction), ceil_div(grid[1], self.reduction)


def resize_pairs(table: Tensor, queries: Grid, keys: Grid, new_queries: Grid, new_keys: Grid) -> Tensor:
    """A table (1, h, H W, H' W') for maps of other sizes, bicubically along each axis of both."""
    with full_precision(table):
        out = table.float()[0].unflatten(2, keys).unflatten(1, queries)  # (h, H, W, H', W')
        for axis, (old, new) in enumerate(zip((*keys, *queries), (*new_keys, *new_queries))):
            axis = (axis + 2) % 4 + 1  # keys first: their map is the smaller one
            matrix = resize_matrix(old, new, 'bicubic', table.device)
            out = torch.tensordot(out, matrix, dims=([axis], [1])).movedim(-1, axis)
        return out.flatten(3, 4).flatten(1, 2)[None].to(table.dtype)


def average(x: Tensor, factor: int) -> Tensor:
    """Means of factor x factor squares, (B, H, W, C) -> (B, ceil(H / factor), ceil(W / factor), C); at a border, of the
    positions that are there."""
    B, height, width, C = x.shape
    rows, cols = ceil_div(height, factor), ceil_div(width, factor)
    bottom, right = padded(height, factor) - height, padded(width, factor) - width
    squares = F.pad(x, (0, 0, 0, right, 0, bottom)).reshape(B, rows, factor, cols, factor, C)
    down = (height - factor * torch.arange(rows, device=x.device)).clamp_max(factor)
    across = (width - factor * torch.arange(cols, device=x.device)).clamp_max(factor)
    return squares.sum((2, 4)) / (down[:, None] * across)[..., None].to(x.dtype)


class ReducedAttention(nn.Module):
    """Attention of all positions to the averages of sr_ratio x sr_ratio squares.

    Args:
        dim: channels.
        num_heads: divides dim.
        norm: makes the norm of averages.
        sr_ratio: 1 attends to the positions themselves.
    """

    def __init__(self, *, dim: int, num_heads: int, norm: NormFactory, sr_ratio: int = 1):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads must divide dim, got {num_heads=}, {dim=}')
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = Linear(dim, dim, bias=False)
        self.kv = Linear(dim, 2 * dim, bias=False)
        self.proj = Linear(dim, dim)
        if sr_ratio > 1:
            self.linear = Linear(dim, dim)
            self.norm = norm(dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), or (B, H, W, C) likewise; reduction needs a map. `bias` is (1, h, N, N')."""
        source = self.norm(self.linear(average(x, self.sr_ratio))) if self.sr_ratio > 1 else x
        query = self.q(x).flatten(1, -2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        pairs = self.kv(source).flatten(1, -2).unflatten(-1, (2, self.num_heads, -1))
        key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if bias is None else bias.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)
        return self.proj(out.reshape(x.shape))


class InnerPart(nn.Module):
    """Words of each sentence attend to each other; norms are over all words of a sentence. Also gives what they add to
    their sentence."""

    def __init__(self, *, dim: int, inner_dim: int, inner_heads: int, norm: NormFactory, mlp_ratio: float):
        super().__init__()
        self.inner_norm1 = norm(WORDS * inner_dim)
        self.inner_attn = ReducedAttention(dim=inner_dim, num_heads=inner_heads, norm=norm)
        self.inner_norm2 = norm(WORDS * inner_dim)
        self.inner_mlp = Mlp(dim=inner_dim, ratio=mlp_ratio)
        self.proj_norm1 = norm(WORDS * inner_dim)
        self.proj = Linear(WORDS * inner_dim, dim, bias=False)
        self.proj_norm2 = norm(dim)

    def forward(self, words: Tensor, drop_path: nn.Module) -> tuple[Tensor, Tensor]:
        """(B, H, W, M, c) -> the same and (B, H, W, C)."""
        branch = self.inner_attn(self._norm(self.inner_norm1, words).flatten(0, 2)).view(words.shape)
        words = words + drop_path(branch)
        words = words + drop_path(self.inner_mlp(self._norm(self.inner_norm2, words)))
        return words, self.proj_norm2(self.proj(self.proj_norm1(words.flatten(3))))

    def _norm(self, norm: nn.Module, words: Tensor) -> Tensor:
        return norm(words.flatten(3)).view(words.shape)


class PyramidTNTBlock(nn.Module):
    """An inner part, where there is one, then attention between sentences and their MLP.

    Args:
        dim, num_heads, sr_ratio: of the sentences.
        inner_dim, inner_heads: of the words; None leaves the inner part out.
        norm: makes the norms.
        mlp_ratio: width of both MLPs over their channels.
        drop_path: probability of dropping a branch while training.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        inner_dim: int | None,
        inner_heads: int,
        norm: NormFactory,
        mlp_ratio: float,
        drop_path: float,
    ):
        super().__init__()
        self.inner = (
            None
            if inner_dim is None
            else InnerPart(dim=dim, inner_dim=inner_dim, inner_heads=inner_heads, norm=norm, mlp_ratio=mlp_ratio)
        )
        self.outer_norm1 = norm(dim)
        self.outer_attn = ReducedAttention(dim=dim, num_heads=num_heads, norm=norm, sr_ratio=sr_ratio)
        self.outer_norm2 = norm(dim)
        self.outer_mlp = Mlp(dim=dim, ratio=mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, words: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Sentences (B, H, W, C) and words (B, H, W, M, c), both as they came."""
        if self.inner is not None:
            words, added = self.inner(words, self.drop_path)
            x = x + added
        x = x + self.drop_path(self.outer_attn(self.outer_norm1(x), bias))
        return x + self.drop_path(self.outer_mlp(self.outer_norm2(x))), words


def _conv(in_dim: int, dim: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(in_dim, dim, 3, stride, 1), nn.BatchNorm2d(dim), nn.ReLU()]


class Stem(nn.Module):
    """An image's sentences (B, H / 8, W / 8, C), words (B, H / 8, W / 8, M, c) and the stage's biases.

    Words are the positions of a map of stride 2, 4 x 4 of them per sentence.
    """

    def __init__(self, in_chans: int, dim: int, inner_dim: int, *, grid: Grid, pairs: PairTable):
        super().__init__()
        self.common_conv = nn.Sequential(*_conv(in_chans, 2 * inner_dim, 2))
        self.inner_convs = nn.Sequential(*_conv(2 * inner_dim, inner_dim, 1))
        self.outer_convs = nn.Sequential(
            *_conv(2 * inner_dim, 4 * inner_dim, 2),
            *_conv(4 * inner_dim, 8 * inner_dim, 2),
            *_conv(8 * inner_dim, dim, 1),
        )
        self.inner_pos = nn.Parameter(torch.zeros(1, WORDS, inner_dim))
        nn.init.trunc_normal_(self.inner_pos, std=0.02)
        self.outer_pos = PositionTable(dim, grid, method='bicubic')
        self.pairs = pairs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.common_conv(x)
        words = to_last(pad_bottom_right(self.inner_convs(x), SIDE))
        B, height, width, c = words.shape
        words = words.reshape(B, height // SIDE, SIDE, width // SIDE, SIDE, c).transpose(2, 3).flatten(3, 4)
        x = to_last(self.outer_convs(x))
        grid = (x.shape[1], x.shape[2])
        x = x + self.outer_pos(grid)[1].unflatten(1, grid)
        return x, words + self.inner_pos, self.pairs(grid)


class Merge(nn.Module):
    """Sentences and words of half the height and width, with other channels, and the stage's biases.

    The words of 2 x 2 sentences are laid out as they lie in the image, 8 x 8, for a convolution of stride 2; sentences
    that an odd size lacks have words of zeros.
    """

    def __init__(self, in_dim: int, dim: int, in_inner: int, inner_dim: int, *, norm: NormFactory, pairs: PairTable):
        super().__init__()
        self.norm = norm(in_dim)
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1)
        self.word_norm = norm(in_inner)
        self.word_conv = nn.Conv2d(in_inner, inner_dim, 3, 2, 1)
        self.pairs = pairs

    def forward(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, words = state
        x = to_last(self.conv(to_first(self.norm(x))))
        grid = (x.shape[1], x.shape[2])
        bottom, right = 2 * grid[0] - words.shape[1], 2 * grid[1] - words.shape[2]
        words = F.pad(self.word_norm(words), (0, 0, 0, 0, 0, right, 0, bottom))
        words = words.unflatten(3, (SIDE, SIDE)).unflatten(2, (grid[1], 2)).unflatten(1, (grid[0], 2))
        words = words.permute(0, 1, 3, 2, 5, 4, 6, 7)  # (B, H, W, 2, 4, 2, 4, c)
        words = words.reshape(-1, 2 * SIDE, 2 * SIDE, words.shape[-1])
        words = to_last(self.word_conv(to_first(words)))
        return x, words.reshape(x.shape[0], *grid, WORDS, words.shape[-1]), self.pairs(grid)


class PyramidTNT(FromStride8):
    """TNT in four stages of strides 8, 16, 32 and 64, with a convolutional stem and attention to averages.

    Args:
        depths, dims: blocks and channels of sentences of each stage.
        num_heads, sr_ratios: attention heads, and side of the squares whose averages are keys and values.
        inner_dims, inner_heads: channels and heads of words.
        mlp_ratio: width of the MLPs over their channels.
        norm: normalisation throughout, by name.
        img_size: height and width that positions and biases are made for, 256 if None.
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='positions and biases bicubically')
    norm_first = True
    same_maps_in_dense = False  # the last stage is the classifier's alone
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 1, 1),
        'dims': (16, 24, 32, 32),
        'num_heads': (1, 2, 2, 2),
        'inner_dims': (4, 6, 8, 8),
        'inner_heads': (1, 2, 2, 2),
        'img_size': 128,  # from smaller ones on the last stage's table has one entry, which changes nothing
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 8, 4, 2),
        dims: Sequence[int] = (128, 256, 512, 512),
        num_heads: Sequence[int] = (4, 8, 16, 16),
        sr_ratios: Sequence[int] = (4, 2, 1, 1),
        inner_dims: Sequence[int] = (8, 16, 32, 32),
        inner_heads: Sequence[int] = (2, 4, 8, 8),
        mlp_ratio: float = 4.0,
        norm: str = 'layer_eps5',
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
        num_heads, sr_ratios = per_stage('num_heads', num_heads), per_stage('sr_ratios', sr_ratios)
        inner_dims, inner_heads = per_stage('inner_dims', inner_dims), per_stage('inner_heads', inner_heads)
        make_norm = norm_factory(norm)
        grids = [grid_of(img_size, 8 * 2**s, 256) for s in range(4)]
        pairs = [PairTable(*part) for part in zip(num_heads, grids, sr_ratios)]
        downsamplings: list[nn.Module] = [Stem(in_chans, dims[0], inner_dims[0], grid=grids[0], pairs=pairs[0])]
        for (before, dim), (inner_before, inner_dim), table in zip(
            itertools.pairwise(dims), itertools.pairwise(inner_dims), pairs[1:]
        ):
            downsamplings.append(Merge(before, dim, inner_before, inner_dim, norm=make_norm, pairs=table))
        stages = [
            [
                PyramidTNTBlock(
                    dim=dims[s],
                    num_heads=num_heads[s],
                    sr_ratio=sr_ratios[s],
                    # words take part in the first block, in long stages in the second one too
                    inner_dim=inner_dims[s] if b == 0 or (b == 1 and depths[s] > 6) else None,
                    inner_heads=inner_heads[s],
                    norm=make_norm,
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                )
                for b, rate in enumerate(rates)
            ]
            for s, rates in enumerate(drop_path_schedule(depths, drop_path_rate))
        ]
        self.assemble_from_8(
            dims=dims,
            downsamplings=downsamplings,
            stages=stages,
            norm=make_norm,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def _stage(self, s: int, x: Any) -> Any:
        """(sentences, words) from those of the stage before, or from images."""
        sentences, words, bias = self.downsample_layers[s](x)
        for block in self.stages[s]:  # type: ignore[attr-defined]
            sentences, words = self._call(block, sentences, words, bias)
        return sentences, words

    def _map(self, state: Any) -> Tensor:
        return state[0]

    def no_weight_decay(self) -> set[str]:
        return {'downsample_layers.0.inner_pos', 'downsample_layers.0.outer_pos.table'}

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers and positions, truncated normal with deviation 0.02; convolutions by their fan out."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            super().init_weights(module)
        elif isinstance(module, PositionTable):
            nn.init.trunc_normal_(module.table, std=0.02)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'outer_pos$', 'downsample_layers.0.outer_pos.table'),
    (r'inner_pos$', 'downsample_layers.0.inner_pos'),
    (r'patch_embed\.', 'downsample_layers.0.'),
    (r'stages\.(\d)\.relative_pos$', r'downsample_layers.\1.pairs.table'),
    (r'stages\.(\d)\.blocks\.(\d+)\.(inner_|proj)', r'stages.\1.\2.inner.\3'),
    (r'stages\.(\d)\.blocks\.(\d+)\.', r'stages.\1.\2.'),
    *((rf'sentence_merges\.{s}\.norm\.', f'downsample_layers.{s + 1}.norm.') for s in range(3)),
    *((rf'sentence_merges\.{s}\.conv\.0\.', f'downsample_layers.{s + 1}.conv.') for s in range(3)),
    *((rf'word_merges\.{s}\.norm\.', f'downsample_layers.{s + 1}.word_norm.') for s in range(3)),
    *((rf'word_merges\.{s}\.conv\.0\.', f'downsample_layers.{s + 1}.word_conv.') for s in range(3)),
]

_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2201.00978',
    'first_conv': 'downsample_layers.0.common_conv.0',
    **ORIGIN,
}


def _variant(
    name: str, size: int, dim: int, heads: int, inner: int, inner_heads: int, depths: tuple[int, ...], **facts: Any
) -> None:
    widths = (1, 2, 4, 4)
    register(
        name,
        PyramidTNT,
        depths=depths,
        dims=tuple(dim * w for w in widths),
        num_heads=tuple(heads * w for w in widths),
        inner_dims=tuple(inner * w for w in widths),
        inner_heads=tuple(inner_heads * w for w in widths),
        img_size=size,
        drop_path=0.1,
        weights=[half_weights('in1k', None, size=size, **facts, **_PAPER)],
    )


_PAN = 'https://pan.baidu.com/s/'
_variant(
    'ptnt_ti_patch16_192', 192, 80, 2, 5, 1, (2, 6, 3, 2),
    top1=75.2, params=10.6, macs=0.6, page=_PAN + '1xm3DSGcAJbvFQm4jmDAlnQ',
)  # fmt: skip
_variant(
    'ptnt_s_patch16_256', 256, 128, 4, 8, 2, (2, 8, 4, 2),
    top1=82.0, params=32.0, macs=3.3, page=_PAN + '1xha8x3DTlPq9-KeC6EPPow',
)  # fmt: skip
_variant(
    'ptnt_m_patch16_256', 256, 192, 4, 12, 2, (2, 8, 6, 2),
    top1=83.5, params=85.0, macs=8.2, page=_PAN + '1B9zkWkrUAETuiyr08ClY-w',
)  # fmt: skip
_variant(
    'ptnt_b_patch16_256', 256, 256, 4, 16, 2, (2, 10, 6, 2),
    top1=84.1, params=157.0, macs=16.0, page=_PAN + '1tT0mxRrZQx6facYsdPBt0g',
)  # fmt: skip
