"""Semantic tokens in plain models: Making Vision Transformers Efficient from A Token Sparsification View,
arXiv 2303.08685.

Written from the paper and the facts of the authors' code for Swin, https://github.com/changsn/STViT-R (MIT); for plain
models they published none. The blocks keep their weights: only what they are given changes. 'stvit' makes a fixed
number of semantic tokens once, and works on them and the prefix tokens from there on. 'stvit_r' gives them back to the
map, group of blocks by group, so that maps of full size come out. Differs: prefix tokens attend to what semantic tokens
attend to; the maxima stay in the tokens (the authors' shortcut), as weights of the model without reduction need it. In
dense form 'stvit' gives each position the token of its part of the map.
"""

# B batch, N tokens, P of them prefix tokens, C channels, H W size of the grid, M semantic tokens
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.grid import ceil_div
from ..layers.semantic import pool_windows
from .interface import Block, Grid, Reduction, TokenModel, Tokens, register_method
from .schedule import Schedule


def pool_parts(x: Tensor, parts: Grid) -> Tensor:
    """The maxima of as many parts of a map as wanted: (B, H, W, C) -> (B, *parts, C); neighbours overlap by at most one
    row or column, and a map with fewer of them than parts repeats some."""
    for axis, count in ((1, parts[0]), (2, parts[1])):
        index = _positions(x.shape[axis], count, x.device)
        x = x.index_select(axis, index.flatten()).unflatten(axis, (count, -1)).amax(axis + 1)
    return x


def _positions(size: int, count: int, device: torch.device) -> Tensor:
    """(count, longest part): the positions of each part along one axis, the last one repeated in shorter parts.

    As arithmetic on tensors, so that it exports with symbolic sizes.
    """
    number = torch.arange(count, device=device)
    first = (number * size).div(count, rounding_mode='floor')
    last = ((number + 1) * size + count - 1).div(count, rounding_mode='floor') - 1
    within = torch.arange(ceil_div(size, count) + 1, device=device)
    return torch.minimum(first[:, None] + within, last[:, None])


def part_of(grid: Grid, parts: Grid, device: torch.device) -> Tensor:
    """(H W,) int64: the part that each position belongs to, by number in row order."""
    rows, columns = (
        (torch.arange(size, device=device) * count).div(size, rounding_mode='floor') for size, count in zip(grid, parts)
    )
    return (rows[:, None] * parts[1] + columns).flatten()


class _Semantic(Reduction):
    """What both forms share: a block whose queries are some tokens and whose keys are more."""

    defaults = {'r': 0}

    def __init__(self, *, model: TokenModel, schedule: Schedule):
        super().__init__(model=model, schedule=schedule)
        if any(schedule.amounts):
            raise ValueError(
                f'{self.method} takes neither r, ratio nor target: the number of semantic tokens says how many are left'
            )

    def begin(self, x: Tensor, grid: Grid, track: bool) -> Tokens:
        # the grid, as a shape: what flows from block to block are tensors
        return super().begin(x, grid, track)._replace(extra=(x.new_zeros(0, *grid),))

    def attend(self, block: Block, asking: Tensor, context: Tensor) -> Tensor:
        """`asking` (B, N, C) after the block, in which it attends to itself and to `context` (B, M, C)."""
        count = asking.shape[1]
        query, key, value = block.split(torch.cat((asking, context), 1))
        return block.mix_channels(block.join(asking, block.attend(query[:, :, :count], key, value)))

    def placed(self, tokens: Tokens, parts: Tensor) -> Tensor | None:
        """`Tokens.place` where semantic tokens stand for the positions of the map."""
        if tokens.place is None:
            return None
        ahead = torch.arange(self.prefix, device=parts.device)
        return torch.cat((ahead, parts + self.prefix)).expand(tokens.x.shape[0], -1)


@register_method('stvit')
class STViT(_Semantic):
    """A fixed number of semantic tokens: block `first` makes them from maxima of the map, which attend to each other
    and to the map; in the next one they attend to both again; the others see them alone.

    Args:
        tokens: semantic tokens, a square number, or (rows, columns) of them.
        first: the block that makes them, not the last one; a third of the depth if None.
        learned: add learned tokens to them in the block after, which sees the first ones without.
        model, schedule: see `Reduction`; there is nothing to schedule.
    """

    def __init__(
        self,
        *,
        model: TokenModel,
        schedule: Schedule,
        tokens: int | Sequence[int] = 16,
        first: int | None = None,
        learned: bool = False,
    ):
        super().__init__(model=model, schedule=schedule)
        self.parts = _parts(tokens)
        if self.parts[0] > model.grid[0] or self.parts[1] > model.grid[1]:
            raise ValueError(
                f'tokens must not be more than the patches, {model.grid[0]} x {model.grid[1]}, got {tokens=}'
            )
        self.first = model.depth // 3 if first is None else first
        if not 0 <= self.first < model.depth - 1:
            raise ValueError(f'first must be a block number from 0 to {model.depth - 2}, got {first=}')
        self.learned = nn.Parameter(torch.empty(1, self.parts[0] * self.parts[1], model.dim)) if learned else None
        if self.learned is not None:
            nn.init.trunc_normal_(self.learned, std=0.02)

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        x, P = tokens.x, self.prefix
        if i == self.first:
            grid: Grid = tokens.extra[0].shape[1:]  # type: ignore[assignment]
            ahead, patches = x[:, :P], x[:, P:]
            pooled = pool_parts(patches.unflatten(1, grid), self.parts).flatten(1, 2)
            place = self.placed(tokens, part_of(grid, self.parts, x.device))
            asking = self.attend(block, torch.cat((ahead, pooled), 1), patches)
            return Tokens(asking, place=place, extra=(patches,))
        if i == self.first + 1:
            (patches,) = tokens.extra
            if self.learned is None:
                return tokens._replace(x=self.attend(block, x, patches), extra=())
            context = torch.cat((x[:, P:], patches), 1)
            asking = torch.cat((x[:, :P], x[:, P:] + self.learned), 1)
            return tokens._replace(x=self._attend_apart(block, asking, context), extra=())
        return self.plain_step(tokens, block)

    def prefix_step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        return super().prefix_step(tokens, block, i) if i > self.first + 1 else self.step(tokens, block, i)

    def _attend_apart(self, block: Block, asking: Tensor, context: Tensor) -> Tensor:
        """`asking` after the block, where its semantic tokens attend to the context and to prefix tokens alone."""
        P, count = self.prefix, asking.shape[1]
        query, key, value = block.split(torch.cat((asking, context), 1))
        key, value = (torch.cat((t[:, :, :P], t[:, :, count:]), 2) for t in (key, value))
        return block.mix_channels(block.join(asking, block.attend(query[:, :, :count], key, value)))


@register_method('stvit_r')
class STViTR(_Semantic):
    """Semantic tokens that come and go, in groups of blocks: a block on the map, one that makes tokens, one in which
    they attend to the map again, some on the tokens alone, and one in which the map attends to them. Blocks that do not
    fill a group stay as they are.

    Args:
        window: side of the windows that tokens are pooled in; the last row and column are repeated where windows do not
            divide the map.
        sample: tokens along a side of each window.
        group: blocks of a group, at least 3, where the map is asked once; six, or those of a shallower model, if None.
        first: the first block of the first group.
        model, schedule: see `Reduction`; there is nothing to schedule.
    """

    def __init__(
        self,
        *,
        model: TokenModel,
        schedule: Schedule,
        window: int = 7,
        sample: int = 3,
        group: int | None = None,
        first: int = 0,
    ):
        super().__init__(model=model, schedule=schedule)
        if not 1 <= sample <= window:
            raise ValueError(f'sample must be from 1 to window, got {sample=}, {window=}')
        group = min(6, model.depth) if group is None else group
        if not 3 <= group <= model.depth:
            raise ValueError(f'group must be from 3 to {model.depth}, the number of blocks, got {group=}')
        if not 0 <= first <= model.depth - group:
            raise ValueError(f'first must be from 0 to {model.depth - group}, so that one group fits, got {first=}')
        self.window, self.sample, self.group, self.first = window, sample, group, first
        self.last = first + (model.depth - first) // group * group

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        x, P = tokens.x, self.prefix
        role = (i - self.first) % self.group if self.first <= i < self.last else 0
        if role == 1:
            grid: Grid = tokens.extra[0].shape[1:]  # type: ignore[assignment]
            patches = x[:, P:].unflatten(1, grid)
            pooled = pool_windows(patches, self.window, self.sample)
            parts = self._part_of(grid, pooled.shape[2], x.device)
            asking = torch.cat((x[:, :P], pooled.flatten(1, 2)), 1)
            asking = self.attend(block, asking, patches.flatten(1, 2))
            return Tokens(asking, place=self.placed(tokens, parts), extra=(*tokens.extra, patches))
        if role == 2 < self.group - 1:
            return tokens._replace(x=self.attend(block, x, tokens.extra[1].flatten(1, 2)))
        if role == self.group - 1:
            patches = tokens.extra[1].flatten(1, 2)
            # prefix tokens and the map ask, prefix tokens and semantic tokens answer
            query = block.split(patches)[0]
            ahead, key, value = block.split(x)
            asking = torch.cat((x[:, :P], patches), 1)
            out = block.attend(torch.cat((ahead[:, :, :P], query), 2), key, value)
            asking = block.mix_channels(block.join(asking, out))
            place = None
            if tokens.place is not None:
                place = torch.arange(asking.shape[1], device=x.device).expand(x.shape[0], -1)
            return Tokens(asking, place=place, extra=tokens.extra[:1])
        return self.plain_step(tokens, block)

    def _part_of(self, grid: Grid, across: int, device: torch.device) -> Tensor:
        """(H W,) int64: the semantic token that stands for each position, by number; `across` are in a row."""
        rows, columns = (self._sample_of(torch.arange(size, device=device)) for size in grid)
        return (rows[:, None] * across + columns).flatten()

    def _sample_of(self, position: Tensor) -> Tensor:
        number = position.div(self.window, rounding_mode='floor')
        within = position - number * self.window
        return number * self.sample + (within * self.sample).div(self.window, rounding_mode='floor')


def _parts(tokens: int | Sequence[int]) -> Grid:
    """Rows and columns of semantic tokens."""
    if isinstance(tokens, int) and not isinstance(tokens, bool):
        side = round(max(tokens, 0) ** 0.5)
        rows, columns = (side, side) if side * side == tokens else (0, 0)
    else:
        rows, columns = tokens if isinstance(tokens, list | tuple) and len(tokens) == 2 else (0, 0)
    if not all(isinstance(n, int) and n > 0 for n in (rows, columns)):
        raise ValueError(f'tokens must be a square number or (rows, columns), got {tokens=}')
    return rows, columns
