"""The plain skeleton: everything that backbones of one resolution share.

    image -> patch_embed -> + pos_embed, prefix tokens ahead -> blocks -> norm -> pool -> head
                                                                    '--> pyramid (dense form)

How a family plugs in. Its constructor makes the parts and hands them to `assemble`:

- `patch_embed`: a tokenizer, (B, C, H, W) -> (B, H', W', dim) with H' = ceil(H / stride); `ConvDownsample` pads by
  itself, others do so with `layers.grid.pad_bottom_right`.
- `position`: None, or a module that takes the grid (H', W') and returns positions (1, P, dim) of the prefix tokens, or
  None, and (1, H' W', dim) of the grid: `layers.positions.PositionTable`, which resizes itself for other grids, of a
  checkpoint too. Modules with tables of another kind (filters, biases) define `resample(state, prefix)` likewise.
- `prefix`: names of the parameters ahead of the patches, `('cls_token',)`; `num_prefix_tokens` counts those that the
  blocks see.
- `blocks`: modules (x, grid) -> x on tokens (B, P + H' W', dim). `grid` is for blocks that see a map:
  `x[:, P:].unflatten(1, grid)`; others ignore it. `layers.TokenBlock` does for most; `build_token_mixer` builds its
  mixer from a name, so that other mixers plug in from a config. Linear layers are `layers.linear.Linear`: the same
  values in less time.

What does not fit is overridden, one small method each: `embed` (streams beside the tokens), `run_blocks` (state that
flows from block to block, recursion, tokens that merge; then see `prefix_suffices` too), `finish` (class attention, the
norm), `pool` (how tokens become one vector). Families whose blocks shrink the grid are better off on `Hierarchical`,
with `PyramidLevel` for strides that they lack. Declare `sizes` (`AnySize()` without position tables), `reduced`, and
`stem_keys`, `new_in_dense` and `classifier_keys` where there are more of them; the rest of timm's interface is
inherited.
"""

# B batch, N tokens, P of them prefix tokens, C channels, H W size of the grid, K classes
import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from .backbone import Backbone, check_format, normalise_indices
from .layers.grid import ceil_div, to_first
from .layers.heads import HeadFactory
from .layers.norm import NormFactory
from .layers.pyramid import PyramidLevel, pyramid_strides
from .reduction.interface import Reduction, TokenModel, Tokens
from .sizes import AnySize, FixedSize, Resampled

Grid = tuple[int, int]


class Plain(Backbone):
    """Blocks of one resolution; as classifier with `norm` and `head`, in dense form with `pyramid.{0..3}`.

    As timm's plain models: `forward_features` returns tokens and `forward_intermediates` maps after single blocks; the
    classifier's `feature_info` lists blocks. The dense form's lists the pyramid's levels.
    """

    sizes: AnySize | FixedSize = Resampled(how='position tables bicubically')
    new_in_dense: ClassVar[tuple[str, ...]] = ('pyramid.',)
    reduced: ClassVar[dict[str, Any]] = {'depth': 3, 'dim': 32, 'num_heads': 2}
    staged = False
    norm_first = True
    prefix_in_blocks = True  # otherwise prefix tokens join after the blocks, in `finish`
    stem_keys: ClassVar[tuple[str, ...]] = ('patch_embed.', 'pos_embed.', 'cls_token', 'dist_token')

    pos_embed: nn.Module | None

    def assemble(
        self,
        *,
        dim: int,
        stride: int,
        patch_embed: nn.Module,
        position: nn.Module | None,
        prefix: Sequence[str],
        blocks: Sequence[nn.Module],
        norm: NormFactory,
        pooling: str,
        head: str | HeadFactory = 'linear',
        pyramid_dim: int | None = None,
        pyramid_blocks: Sequence[int] | None = None,
        in_chans: int,
        num_classes: int,
        drop_rate: float,
        features_only: bool,
        out_indices: int | Sequence[int],
    ) -> None:
        """Puts the parts in place; called once, at the end of a family's constructor.

        Args:
            dim: channels.
            stride: of the patches, in pixels.
            patch_embed, position, prefix, blocks: see the top of this file.
            norm: makes the classifier's norm.
            pooling: 'token', the first prefix token, or 'avg', the mean of the patches; other names for families that
                override `pool`.
            head: 'linear', 'mlp', or what makes the family's own (see `layers.heads`).
            pyramid_dim: channels of all maps in dense form, by a 1x1 and a 3x3 convolution per level, for heads
                without a neck (ViTDet); None leaves those to the neck.
            pyramid_blocks: the block that each level of the pyramid is made from, the finest level first (BEiT with
                UPerNet, arXiv 2106.08254: a third, a half, two thirds and all of the depth); None: all from the last.
            in_chans: channels of the image.
            num_classes: classes of the classifier; 0 returns pooled features.
            drop_rate: dropout before the classifier's last layer.
            features_only: dense form: a pyramid instead of logits.
            out_indices: levels of the pyramid in dense form; a number n means the last n.
        """
        if pooling == 'token' and not prefix:
            raise ValueError(f'{pooling=} needs a prefix token')
        self.stride, self.pooling = stride, pooling
        self.num_prefix_tokens = len(prefix) if self.prefix_in_blocks else 0  # of those that blocks see
        self.in_chans, self.num_features, self.drop_rate = in_chans, dim, drop_rate
        self.features_only, self.head_kind, self.grad_checkpointing = features_only, head, False
        self.reduction: Reduction | None = None  # set by `reduce_tokens`
        self.prefix_names = tuple(prefix)
        for name in prefix:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, dim)))
        self.patch_embed = patch_embed
        self.pos_embed = position
        self.blocks = nn.ModuleList(blocks)
        self.absent_keys = ()
        if not features_only:
            self.out_indices = tuple(range(len(blocks)))
            info = [{'num_chs': dim, 'reduction': stride, 'module': f'blocks.{i}'} for i in self.out_indices]
            self.norm = norm(dim)
            self._set_head(num_classes)
        else:
            self.num_classes = 0
            strides = self.strides = pyramid_strides(stride, type(self).strides)  # type: ignore[misc]
            self.out_indices = normalise_indices(out_indices, len(strides))
            self.pyramid_blocks = self._pyramid_blocks(pyramid_blocks, len(strides))
            levels = [PyramidLevel(dim, stride=stride, target=target, width=pyramid_dim) for target in strides]
            info = [
                {'num_chs': level.dim, 'reduction': target, 'module': f'pyramid.{i}'}
                for i, (level, target) in enumerate(zip(levels, strides))
            ]
            self.pyramid = nn.ModuleDict({str(i): levels[i] for i in self.out_indices})
            self.absent_keys = tuple(f'pyramid.{i}.' for i in range(len(strides)) if i not in self.out_indices)
        self.feature_info = FeatureInfo(info, self.out_indices)

    def _pyramid_blocks(self, blocks: Sequence[int] | None, levels: int) -> tuple[int, ...]:
        depth = len(self.blocks)
        if blocks is None:
            return (depth - 1,) * levels
        if len(blocks) != levels or any(not isinstance(i, int) or not -depth <= i < depth for i in blocks):
            raise ValueError(
                f'pyramid_blocks must be {levels} blocks, one for each level, from 0 to {depth - 1}, got {blocks}'
            )
        return tuple(i % depth for i in blocks)

    # ---- forward

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, or in dense form a pyramid.

        Args:
            x: float (B, in_chans, H, W), normalised with `default_cfg`'s mean and std; sizes as `self.sizes` says.

        Returns:
            Logits (B, K); in dense form a list of (B, C, ceil(H / s), ceil(W / s)) maps for the strides s of
            `feature_info.reduction()`, with channels_last strides.
        """
        self._check_image(x)
        if not self.features_only:
            return self.forward_head(self.finish(self._read_by_head(*self.embed(x))))
        height, width = x.shape[-2:]
        tokens, grid = self.embed(x)
        end = len(self.blocks) - 1
        read = {self.pyramid_blocks[i] for i in self.out_indices}
        early = sorted(read - {end})
        tokens, kept = self.run_blocks(tokens, grid, early, None if end in read else early[-1])
        maps = {block: self.to_map(out, grid) for block, out in zip((*early, end), (*kept, tokens))}
        return [
            to_first(self.pyramid[str(i)](maps[self.pyramid_blocks[i]], (ceil_div(height, s), ceil_div(width, s))))
            for i, s in zip(self.out_indices, self.feature_info.reduction())
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) after the last block, and after `norm` where that comes before pooling."""
        self._check_image(x)
        tokens, grid = self.embed(x)
        return self.finish(self.run_blocks(tokens, grid)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of `forward_features`' tokens; with `pre_logits` what enters the last layer."""
        self._require_classifier('forward_head')
        x = self.pool(x)
        if not self.norm_first:
            x = self.norm(x)
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after single blocks, as timm defines it; in dense form too, where the pyramid is `forward`'s.

        Args:
            x: as in `forward`.
            indices: blocks whose output is returned; a number n means the last n, None all.
            return_prefix_tokens: return pairs of a map and its prefix tokens (B, P, C).
            norm: apply the classifier's norm to them.
            stop_early: leave out blocks after the last one wanted.
            output_fmt: 'NCHW', 'NHWC' or 'NLC' (tokens without the prefix).
            intermediates_only: return the list alone.

        Returns:
            (result of forward_features, list of maps), or the list of maps.

        Raises:
            ValueError: an index or the format is not valid, or the image's shape is not one this backbone takes.
        """
        check_format(output_fmt, ('NCHW', 'NHWC', 'NLC'))
        self._check_image(x)
        wanted = normalise_indices(len(self.blocks) if indices is None else indices, len(self.blocks))
        last = wanted[-1] if stop_early or intermediates_only else None
        tokens, grid = self.embed(x)
        tokens, kept = self.run_blocks(tokens, grid, wanted, last)
        maps: list[Any] = []
        for out in kept:
            if norm and hasattr(self, 'norm'):
                out = self.norm(out)
            patches = out[:, self.num_prefix_tokens :] if output_fmt == 'NLC' else self.to_map(out, grid)
            patches = to_first(patches) if output_fmt == 'NCHW' else patches
            maps.append((patches, out[:, : self.num_prefix_tokens]) if return_prefix_tokens else patches)
        return maps if intermediates_only else (self.finish(tokens), maps)

    # ---- the steps, for families to override

    def embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """An image's tokens (B, N, C) and the grid (H, W) of those that are patches."""
        x = self.patch_embed(x)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        ahead, positions = (None, None) if self.pos_embed is None else self.pos_embed(grid)
        if positions is not None:
            x = x + positions
        if not self.num_prefix_tokens:
            return x, grid
        prefix = torch.cat([getattr(self, name) for name in self.prefix_names], 1)
        prefix = prefix if ahead is None else prefix + ahead
        return torch.cat((prefix.expand(x.shape[0], -1, -1), x), 1), grid

    def run_blocks(
        self, x: Tensor, grid: Grid, wanted: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The tokens after the blocks, up to block `last`, and those after each block in `wanted`."""
        if self.reduction is not None:
            tokens, kept = self._run_reduced(self.reduction, x, grid, True, wanted, last)
            return self.reduction.restore(tokens), kept
        kept = []
        for i, block in enumerate(self.blocks):
            x = self._call(block, x, grid)
            if i in wanted:
                kept.append(x)
            if i == last:
                break
        return x, kept

    @property
    def prefix_suffices(self) -> bool:
        """Whether the last block may compute the prefix tokens alone, in evaluation, as the head reads no others.

        False for families whose blocks or head read more, and where `run_blocks` returns something else than the
        blocks' tokens.
        """
        single: bool = getattr(self.blocks[-1], 'prefix_alone', False)
        return single and self.pooling == 'token' and self.num_prefix_tokens > 0 and not self.training

    def _read_by_head(self, x: Tensor, grid: Grid) -> Tensor:
        """The tokens after the last block, or the first of them where the head needs no more: the same in less time."""
        if self.reduction is not None:
            prefix_alone = self.pooling == 'token' and self.num_prefix_tokens > 0
            tokens, _ = self._run_reduced(self.reduction, x, grid, not prefix_alone, prefix_alone=prefix_alone)
            return self.reduction.for_head(tokens, prefix_alone)
        if not self.prefix_suffices:
            return self.run_blocks(x, grid)[0]
        if len(self.blocks) > 1:
            x = self.run_blocks(x, grid, last=len(self.blocks) - 2)[0]
        return self._call(self.blocks[-1], x, grid, None, self.num_prefix_tokens)

    def _run_reduced(
        self,
        reduction: Reduction,
        x: Tensor,
        grid: Grid,
        track: bool,
        wanted: Collection[int] = (),
        last: int | None = None,
        prefix_alone: bool = False,
    ) -> tuple[Tokens, list[Tensor]]:
        blocks: Any = self.blocks
        call = self._call
        return reduction.run(
            blocks, x, grid, call=call, track=track, wanted=wanted, last=last, prefix_alone=prefix_alone
        )

    def finish(self, x: Tensor) -> Tensor:
        """What follows the blocks in a classifier."""
        return self.norm(x) if self.norm_first and not self.features_only else x

    def pool(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, C)."""
        return x[:, 0] if self.pooling == 'token' else x[:, len(self.prefix_names) :].mean(1)

    def to_map(self, x: Tensor, grid: Grid) -> Tensor:
        """The patches among the tokens as a map (B, H, W, C)."""
        return x[:, self.num_prefix_tokens :].unflatten(1, grid)

    def token_model(self) -> TokenModel:
        """What `reduce_tokens` needs to know.

        Raises:
            ValueError: a block needs the grid, or attends within windows.
        """
        for i, block in enumerate(self.blocks):
            if not getattr(block, 'any_tokens', False):
                mixer = getattr(block, 'attn', block)
                raise ValueError(
                    f'{self.title} has no sequence of tokens to reduce: block {i} ({type(mixer).__name__}) needs all '
                    f'tokens on their grid; attention to all tokens is what reduce_tokens takes'
                    + ('; build the model with window_size=None' if getattr(mixer, 'window_size', None) else '')
                )
        stride = self.stride
        own = getattr(self.pos_embed, 'grid', None)
        size = (own[0] * stride, own[1] * stride) if own else self.default_cfg['input_size'][-2:]
        first: Any = self.blocks[0]
        attention = first.attn if hasattr(first, 'attn') else first.attns[0].part
        return TokenModel(
            depth=len(self.blocks),
            dim=self.num_features,
            num_heads=attention.num_heads,
            prefix=self.prefix_names if self.prefix_in_blocks else (),
            grid=(ceil_div(size[0], stride), ceil_div(size[1], stride)),
            image_size=size,
            in_chans=self.in_chans,
            blocks=lambda: list(self.blocks),
        )

    # ---- timm's interface

    def block_names(self) -> list[list[str]]:
        return [[f'blocks.{i}'] for i in range(len(self.blocks))]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        names = [name for group in self.block_names() for name in group]
        blocks: list[Any] = [(rf'^{re.escape(name)}\.', (i,)) for i, name in enumerate(names)]
        return {
            'stem': '^(?:' + '|'.join(map(re.escape, self.stem_keys)) + ')',
            'blocks': [*blocks, (r'^norm\.', (99999,))],  # the norm learns with the last block
            'head': '^(?:' + '|'.join(map(re.escape, ('head.', *self.new_in_dense))) + ')',
        }

    def no_weight_decay(self) -> set[str]:
        names = {name for name, _ in self.named_parameters()}
        return names & {*self.prefix_names, 'pos_embed.table'}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` classes (0: pooled features); `global_pool` 'token' or 'avg' changes pooling."""
        allowed = {self.pooling, 'avg', *(('token',) if self.prefix_names else ())}
        if global_pool is not None and global_pool not in allowed:
            raise ValueError(f'global_pool must be one of {", ".join(sorted(allowed))}, got {global_pool=}')
        super().reset_classifier(num_classes)
        self.pooling = global_pool or self.pooling

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers and tables of positions, truncated normal with deviation 0.02; convolutions keep PyTorch's own
        initialisation. Prefix tokens: see `init_prefix`."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)
        elif hasattr(module, 'table') and isinstance(module.table, nn.Parameter) and module.table.requires_grad:
            nn.init.trunc_normal_(module.table, std=0.02)

    def init_prefix(self) -> None:
        """Prefix tokens, truncated normal with deviation 0.02."""
        for name in self.prefix_names:
            nn.init.trunc_normal_(getattr(self, name), std=0.02)


def block_windows(depth: int, window_size: int | None, global_blocks: Sequence[int] | None = None) -> list[int | None]:
    """The window of each block: None attends to all tokens.

    Args:
        depth: number of blocks.
        window_size: side of the windows; None gives no block one.
        global_blocks: blocks that keep global attention, negative ones counted from the end; None takes four evenly
            spaced ones, the last block among them (ViTDet).

    Raises:
        ValueError: an index is out of range.
    """
    if window_size is None:
        return [None] * depth
    if global_blocks is None:
        chosen = {(i + 1) * depth // 4 - 1 for i in range(4)} - {-1}
    else:
        chosen = {i + depth if i < 0 else i for i in global_blocks}
        if any(not 0 <= i < depth for i in chosen):
            raise ValueError(f'global_blocks must be block numbers from 0 to {depth - 1}, got {tuple(global_blocks)}')
    return [None if i in chosen else window_size for i in range(depth)]


def check_plain(*, depth: int, dim: int, patch_size: int) -> None:
    """Raises ValueError unless depth, dim and patch_size are positive whole numbers."""
    for name, value in (('depth', depth), ('dim', dim), ('patch_size', patch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be a positive whole number, got {name}={value!r}')
