"""STViT-R on Swin: Making Vision Transformers Efficient from A Token Sparsification View, arXiv 2303.08685.

Written from the paper and the facts of the authors' code, https://github.com/changsn/STViT-R (MIT). In the third stage
most blocks work on few semantic tokens; the last block of six gives them back to the map. Differs: images of every size
are taken, by the rules of `layers.semantic`; the authors' code takes 224. In dense form the blocks attend as in the
classifier, globally among the tokens: the authors' detection code restricts them to windows of 14 to 27 positions and
masks padding by a rule of its own. Its weights load all the same.
"""

# B batch, C channels, H W size of the stage's map, M semantic tokens on a map of their own, h heads
import itertools
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .layers import MetaFormerBlock, Mlp, Scale, drop_path_schedule, norm_factory
from .layers.conv import ConvNorm
from .layers.grid import ceil_div, from_windows, grid_of, to_first, to_last, to_windows
from .layers.norm import NormFactory
from .layers.resize import resize_table, same_size
from .layers.scale import fold_scale
from .layers.semantic import SemanticAttention, patches_around, pool_windows
from .registry import register, weights
from .sizes import Resampled
from .skeleton import Hierarchical, check_stages, per_stage, rename
from .swin import PatchMerging, WindowAttention


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm and hardswish: an image -> (B, ceil(H / 4), ceil(W / 4), C)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, kernel=3, stride=2, act='hardswish')
        self.conv2 = ConvNorm(dim // 2, dim, kernel=3, stride=2, act='hardswish')

    def forward(self, x: Tensor) -> Tensor:
        return to_last(self.conv2(self.conv1(x)))


class SemanticBlock(nn.Module):
    """What the blocks that read or write semantic tokens share: attention to a context, an MLP, scales of both.

    Args:
        dim: channels.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over dim.
        qkv_bias: learn a bias of queries, keys and values.
        norm: makes the norms.
        drop_path: probability of dropping a branch for an image while training.
        layer_scale: start value of the branches' scales.
        bias_side: see `SemanticAttention`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        norm: NormFactory,
        drop_path: float,
        layer_scale: float = 1e-5,
        bias_side: int | None = None,
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = SemanticAttention(dim=dim, num_heads=num_heads, qkv_bias=qkv_bias, bias_side=bias_side)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim=dim, ratio=mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.layer_scale1: Scale | None = Scale(dim, init=layer_scale)
        self.layer_scale2: Scale | None = Scale(dim, init=layer_scale)

    def mix_channels(self, x: Tensor) -> Tensor:
        """x and its MLP."""
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.layer_scale2))

    def mixed(self, query: Tensor, keys_values: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The scaled branch of attention."""
        return _scaled(self.attn(query, keys_values, size), self.layer_scale1)

    def for_deploy(self) -> nn.Module:
        """The same block in evaluation mode, with the scales inside the last linear layers of their branches."""
        self.layer_scale1 = fold_scale(self.attn, self.layer_scale1)
        self.layer_scale2 = fold_scale(self.mlp, self.layer_scale2)
        return self


def _scaled(x: Tensor, scale: Scale | None) -> Tensor:
    return x if scale is None else scale(x)


class TokenGeneration(SemanticBlock):
    """A map's semantic tokens: maxima of s x s parts of each window, which attend to each other and to the positions
    around; (B, H, W, C) -> (B, s ceil(H / w), s ceil(W / w), C).

    Args:
        window_size, sample: w and s.
        key_window: side of the patch around each window that its tokens attend to.
        shortcut: add the maxima to what attention gives.
        conv_position: add a depthwise 3x3 convolution of each window's maxima to them.
        The others: see `SemanticBlock`.
    """

    def __init__(
        self,
        *,
        dim: int,
        window_size: int,
        sample: int,
        key_window: int,
        shortcut: bool,
        conv_position: bool,
        **parts: Any,
    ):
        super().__init__(dim=dim, **parts)
        self.window_size, self.sample, self.key_window, self.shortcut = window_size, sample, key_window, shortcut
        self.conv_position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if conv_position else None

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Without `tokens`, a map of them from before, it starts at maxima."""
        pooled = pool_windows(x, self.window_size, self.sample) if tokens is None else tokens
        size = (pooled.shape[1], pooled.shape[2])
        pooled = to_windows(pooled, self.sample)
        if self.conv_position is not None:
            maps = to_first(pooled.flatten(0, 1).unflatten(1, (self.sample, self.sample)))
            pooled = to_last(maps + self.conv_position(maps)).reshape(pooled.shape)
        query = self.norm1(pooled)
        # the norm and the projection act on single positions: once on the map, not once for each patch
        around = patches_around(self.attn.kv(self.norm1(x)), self.window_size, self.key_window)
        mixed = self.mixed(query, torch.cat((self.attn.kv(query), around), 2))
        if self.shortcut:  # without, the authors drop no path here
            mixed = pooled + self.drop_path(mixed)
        return self.mix_channels(from_windows(mixed, self.sample, size))


class TokenExchange(SemanticBlock):
    """Semantic tokens attend to each other and to the whole map; `learned` (1, M, C), if there, is added to them first.

    Args:
        token_grid: size of the map of tokens that `learned` is made for, None to go without.
        The others: see `SemanticBlock`.
    """

    def __init__(self, *, dim: int, token_grid: tuple[int, int] | None = None, **parts: Any):
        super().__init__(dim=dim, **parts)
        self.token_grid = token_grid
        learned = None if token_grid is None else torch.empty(1, token_grid[0] * token_grid[1], dim)
        self.learned = None if learned is None else nn.Parameter(nn.init.trunc_normal_(learned, std=0.02))

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        size = (tokens.shape[1], tokens.shape[2])
        tokens, context = tokens.flatten(1, 2), self.norm1(x).flatten(1, 2)
        normed = self.norm1(tokens)
        context = torch.cat((normed, context), 1)  # without what is learned
        if self.learned is not None:
            tokens = tokens + self._resized(size)
            normed = self.norm1(tokens)
        tokens = tokens + self.drop_path(self.mixed(normed, self.attn.kv(context)))
        return self.mix_channels(tokens).unflatten(1, size)

    def _resized(self, size: tuple[int, int]) -> Tensor:
        assert self.learned is not None and self.token_grid is not None
        if same_size(size, self.token_grid):
            return self.learned
        resized = resize_table(self.learned[0].unflatten(0, self.token_grid), size, 'bicubic')
        return resized.flatten(0, 1)[None].to(self.learned.dtype)


class TokenMixing(SemanticBlock):
    """Semantic tokens attend to each other: those of one window, or with window None all.

    Args:
        window: side of the windows, on the map of tokens.
        The others: see `SemanticBlock`.
    """

    def __init__(self, *, window: int | None, **parts: Any):
        super().__init__(**parts)
        self.window = window

    def forward(self, tokens: Tensor) -> Tensor:
        size = (tokens.shape[1], tokens.shape[2])
        normed = self.norm1(tokens)
        if self.window is None:
            normed = normed.flatten(1, 2)
            branch = self.mixed(normed, self.attn.kv(normed), size).unflatten(1, size)
        else:
            normed = to_windows(normed, self.window)
            branch = self.mixed(normed, self.attn.kv(normed), (self.window, self.window))
            branch = from_windows(branch, self.window, size)
        return self.mix_channels(tokens + self.drop_path(branch))


class Recovery(SemanticBlock):
    """Each position of a map attends to the semantic tokens; (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        keys_values = self.attn.kv(self.norm1(tokens.flatten(1, 2)))
        branch = self.mixed(self.norm1(x).flatten(1, 2), keys_values).unflatten(1, size)
        return self.mix_channels(x + self.drop_path(branch))


class STViTSwin(Hierarchical):
    """Swin whose third stage works on semantic tokens, in groups of six blocks: windows, token generation, exchange,
    tokens within windows, tokens among all, recovery.

    Args:
        depths, dims: blocks and channels of each stage; the third stage's depth is a multiple of six.
        num_heads: attention heads of each stage.
        window_size: side of the windows, one for all stages or one per stage.
        sample: semantic tokens along a side of each window of the third stage.
        key_window: side of the patch around a window that its tokens attend to when they are made.
        learned_tokens: add learned tokens to the first group's, which sees the image before they do (the authors'
            use_global).
        token_bias: learned bias of attention among tokens by their offset (the authors' relative_pos).
        shortcut: keep the pooled maxima in the tokens.
        conv_position: a depthwise convolution of the pooled maxima (the authors' use_conv_pos).
        mlp_ratio: width of the MLPs over that of the stage.
        qkv_bias: learn a bias of queries, keys and values.
        layer_scale: start value of the scales of the other stages' branches; None leaves them out.
        always_shift: shift on maps of one window too, as the authors' dense form does and their classifier does not.
        norm: normalisation throughout, by name.
        img_size: height and width that learned tokens and biases among tokens are made for; 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='learned tokens bicubically')
    norm_first = True
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 2, 6, 1),
        'dims': (16, 32, 48, 64),
        'num_heads': (1, 2, 3, 4),
        'window_size': (4, 3, 3, 2),
        'sample': 2,
        'key_window': 5,
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        sample: int = 3,
        key_window: int = 10,
        learned_tokens: bool = False,
        token_bias: bool = False,
        shortcut: bool = False,
        conv_position: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        always_shift: bool = False,
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
        if depths[2] % 6:
            raise ValueError(f"the third stage's depth must be a multiple of six, got {depths=}")
        windows = per_stage('window_size', window_size)
        if any(side < 1 for side in windows):
            raise ValueError(f'window_size must be positive, got {window_size=}')
        if not 1 <= sample <= windows[2] <= key_window:
            raise ValueError(
                "sample must be from 1 to the third stage's window_size, and key_window not below that, got "
                f'{sample=}, {window_size=}, {key_window=}'
            )
        make_norm = norm_factory(norm)
        heads, rates = per_stage('num_heads', num_heads), drop_path_schedule(depths, drop_path_rate)
        grid = [ceil_div(side, windows[2]) * sample for side in grid_of(img_size, self.strides[2])]

        def swin_block(s: int, n: int, scale: float | None) -> nn.Module:
            shift = windows[s] // 2 if n % 2 and s != 2 else 0
            attention = WindowAttention(
                dim=dims[s],
                num_heads=heads[s],
                window_size=windows[s],
                shift=shift,
                always_shift=always_shift,
                qkv_bias=qkv_bias,
            )
            return MetaFormerBlock(
                dim=dims[s],
                norm=make_norm,
                mixer=attention,
                mlp=Mlp(dim=dims[s], ratio=mlp_ratio),
                drop_path=rates[s][n],
                layer_scale=scale,
            )

        def semantic_block(n: int) -> nn.Module:
            parts: dict[str, Any] = dict(
                dim=dims[2], num_heads=heads[2], mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm=make_norm
            )
            parts['drop_path'] = rates[2][n]
            match n % 6:
                case 0:
                    return swin_block(2, n, None)
                case 1:
                    return TokenGeneration(
                        window_size=windows[2],
                        sample=sample,
                        key_window=key_window,
                        shortcut=shortcut,
                        conv_position=conv_position,
                        **parts,
                    )
                case 2:
                    return TokenExchange(token_grid=(grid[0], grid[1]) if learned_tokens and n == 2 else None, **parts)
                case 3:
                    return TokenMixing(window=sample, bias_side=sample if token_bias else None, **parts)
                case 4:
                    return TokenMixing(window=None, bias_side=max(grid) if token_bias else None, **parts)
                case _:
                    return Recovery(**parts)

        self.assemble(
            dims=dims,
            downsamplings=[
                ConvStem(in_chans, dims[0]),
                *(PatchMerging(a, b, norm=make_norm) for a, b in itertools.pairwise(dims)),
            ],
            stages=[
                [semantic_block(n) if s == 2 else swin_block(s, n, layer_scale) for n in range(depth)]
                for s, depth in enumerate(depths)
            ],
            output_norm=make_norm,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        # below this size, what a block does depends on the size: whether it is shifted, how far its patch reaches
        limits = [stride * side + 1 for stride, side, depth in zip(self.strides, windows, depths) if depth > 1]
        limits.append(self.strides[2] * (key_window - 1) + 1)
        self.min_dynamic_size = max(limits)  # type: ignore[misc]
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers, truncated normal with deviation 0.02; convolutions keep PyTorch's own initialisation."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith('position_bias.table')}

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        tokens: Tensor | None = None
        for block in blocks:  # type: ignore[attr-defined]
            if isinstance(block, TokenGeneration):
                tokens = self._call(block, x)
            elif isinstance(block, TokenExchange):
                assert tokens is not None
                tokens = self._call(block, tokens, x)
            elif isinstance(block, TokenMixing):
                assert tokens is not None
                tokens = self._call(block, tokens)
            elif isinstance(block, Recovery):
                x = self._call(block, x, tokens)
            else:
                x = self._call(block, x)
        return x

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, where patch merging ends a stage, and a third stage's blocks are of two kinds."""
        semantic = sorted(
            {match[1] for match in map(re.compile(r'layers\.2\.blocks\.(\d+)\.attn\.q\.').match, state) if match}
        )
        rules = [
            (rf'layers\.2\.blocks\.{n}\.{theirs}', rf'stages.2.{n}.{ours}')
            for n in semantic
            for theirs, ours in _IN_SEMANTIC_BLOCK
        ]
        return rename(state, [*rules, *_RENAMES])


_IN_SEMANTIC_BLOCK = [
    (r'attn\.relative_position_bias_table$', 'attn.position_bias.table'),
    (r'layer_scale_(\d)$', r'layer_scale\1.scale'),
    (r'conv_pos\.proj\.0\.', 'conv_position.'),
    ('', ''),
]
_BLOCK = r'layers\.(\d+)\.blocks\.(\d+)\.'
_RENAMES = [
    (r'patch_embed\.proj\.0\.c\.', 'downsample_layers.0.conv1.conv.'),
    (r'patch_embed\.proj\.0\.bn\.', 'downsample_layers.0.conv1.norm.'),
    (r'patch_embed\.proj\.2\.c\.', 'downsample_layers.0.conv2.conv.'),
    (r'patch_embed\.proj\.2\.bn\.', 'downsample_layers.0.conv2.norm.'),
    *((rf'layers\.{s}\.downsample\.', f'downsample_layers.{s + 1}.') for s in range(3)),
    (r'layers\.2\.semantic_token2$', 'stages.2.2.learned'),
    (_BLOCK + r'attn\.relative_position_bias_table$', r'stages.\1.\2.token_mixer.position_bias.table'),
    (_BLOCK + r'attn\.', r'stages.\1.\2.token_mixer.'),
    (_BLOCK + r'layer_scale_(\d)$', r'stages.\1.\2.layer_scale\3.scale'),
    (_BLOCK, r'stages.\1.\2.'),
    (r'norm(\d)\.', r'output_norms.\1.'),
]

_PAGE = 'https://huggingface.co/csncsn/STViT-R'
_FILES = _PAGE + '/resolve/main/'
_ORIGIN: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2303.08685',
    'origin': 'https://github.com/changsn/STViT-R',
    'licence': 'mit',
    'first_conv': 'downsample_layers.0.conv1.conv',
    'crop_pct': 0.875,
}

# the authors published neither weights nor a result of the tiny model; parameters are those of their code
register(
    'stvit_r_swin_tiny',
    STViTSwin,
    depths=(2, 2, 6, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    dense=dict(always_shift=True),
    drop_path=0.2,
    weights=[weights('in1k', None, top1=None, params=28.3, macs=None, **_ORIGIN)],
)
# parameters and multiply-adds of the small model are those of the authors' log, the base model's of their code
register(
    'stvit_r_swin_small',
    STViTSwin,
    depths=(2, 2, 18, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    dense=dict(always_shift=True),
    drop_path=0.3,
    weights=[weights('in1k', _FILES + 'STViT-R-Swin-S.pth', top1=82.7, params=49.6, macs=None, **_ORIGIN)],
)
register(
    'stvit_r_swin_base',
    STViTSwin,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    dense=dict(always_shift=True),
    drop_path=0.4,
    weights=[weights('in1k', _FILES + 'STViT-R-Swin-B.pth', top1=83.2, params=88, macs=None, **_ORIGIN)],
)
