"""Fewer tokens in a transformer: what every method shares, and what the author of a method writes.

    embed -> begin -> step of block 0 -> ... -> step of the last block -> for_head -> norm, pooling, head
                                                                       '-> restore -> map, pyramid

A model that `reduce_tokens` returns holds its method as the submodule `reduction`; its own parameters keep their names.
While blocks run, tokens travel as `Tokens`: the values, and what is needed to know what became of every token that
entered. Outside the blocks nobody sees that there were fewer: `restore` gives every original token a value again, so
that maps, pyramids, means over all tokens and class attention over them work unchanged.

How to write a method: a subclass of `Reduction`, in a file of its own, with `@register_method('name')`.

- `step(tokens, block, i)` runs block number i and returns the tokens that leave it. `self.plain_step` is a block as it
  is. A block offers its parts (see `Block`): `split` into queries, keys and values of all heads
  (`query_key` and `value` apart), `weigh` for the
  attention matrix or `attend` for its product with values, `join` for the residual sum, `mix_channels` for the MLP.
  Normalisation, layer scale, stochastic depth, gates and mixed heads are inside of these: call them and all of that
  composes. `self.remove(i, N)` is the number of tokens that the schedule takes away in this block.
- Merging tokens: build the result with `tokens.merged(x, size, place)`, where place (B, N) says at which position each
  of the N tokens `tokens.x` is now. Reordering is merging without merges. Dropping tokens: `place` is -1 for those
  dropped, and `restore` must be overridden; what that takes goes into `extra`. Queries of some tokens alone are fine:
  `join(x, out)` wants as many tokens as outputs.
- A variable number of tokens per image: `alive` (B, N) marks those that exist; `self.bias(tokens)` keeps the others
  from being attended to. What they compute is of no interest, but must be finite. Give results that do not depend on
  the rest of the batch; if a batch is shortened to the longest item, do so in eager mode alone: where
  `torch.compiler.is_compiling()` is true (compiled and exported graphs), shapes must not depend on values.
- Masks of attention, (B, 1 or h, 1 or N, N): pass them to `weigh` or `attend` as `bias`, -inf where nothing is attended
  to.
- Learned parts (adapters, predictors, semantic tokens): build them in the constructor, from `self.model`; their keys
  start with `reduction.`. A method that replaces all tokens overrides `begin` or `step`, and `restore` by what recovers
  the map; `for_head` if the head reads something else than prefix tokens or restored ones. Whatever flows from block to
  block goes through `Tokens.extra`, never through attributes: blocks are computed twice under checkpointing.
- Keys of the authors' checkpoints: `resample(state, prefix)` renames in place; prefix is 'reduction.'. Weights of the
  model without reduction load too: keys below `reduction.` may be missing.
- Losses of a method's own (a sparsity term): `penalties(tokens)` from what the last block left, `extra` among it;
  `train.ReducedClassifier` adds them.
- Settings are keyword-only arguments of the constructor beside `model` and `schedule`, which `reduce_tokens` hands
  over; it names a misspelt one. `defaults` is the schedule if the caller states none, `layers` which blocks reduce.
"""

# B batch, N tokens now, N0 tokens that entered, P of them prefix tokens, C channels, h heads, d head width
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...kernels.token_places import take_places
from .schedule import Schedule

Grid = tuple[int, int]


class Block(Protocol):
    """A block's parts; `layers.TokenBlock` and `three_things.ParallelBlock` have them, timm's blocks by an adapter."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, h, N, d) of the normalised tokens."""

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys alone."""

    def value(self, x: Tensor) -> Tensor:
        """Values alone."""

    def weigh(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention weights (B, h, Nq, Nk); `bias` is added to the scaled products."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """weigh(...) @ value, (B, h, Nq, d), faster."""

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        """x + the attention branch, from the heads' outputs (B, h, N, d): N must be x's."""

    def mix_channels(self, x: Tensor) -> Tensor:
        """The second half of the block."""


class Tokens(NamedTuple):
    """Tokens between two blocks.

    Attributes:
        x: (B, N, C), prefix tokens first.
        size: (B, N, 1), how many original tokens each stands for; None as long as each stands for itself.
        place: (B, N0) int64, the position in x of what each original token became part of, -1 if it was dropped; None
            where nobody asks for it, or all are where they were.
        alive: (B, N) bool, tokens that exist; None if all do.
        extra: what a method carries from block to block.
        detail: (B, N0, C), what each original token was more than what it became part of, summed over the merges; None
            as long as there were none, or where nobody asks for it.
    """

    x: Tensor
    size: Tensor | None = None
    place: Tensor | None = None
    alive: Tensor | None = None
    extra: tuple[Tensor, ...] = ()
    detail: Tensor | None = None

    def merged(self, x: Tensor, size: Tensor | None, place: Tensor | None, alive: Tensor | None = None) -> 'Tokens':
        """The tokens after a merge; `self.x` are those before it.

        Args:
            x, size, alive: as in `Tokens`, of the tokens that are left.
            place: (B, N) int64, where each of the tokens before is now; needed where `self.place` is not None.
        """
        moved = self.moved(place)
        if self.place is None or moved is None:
            return Tokens(x, size, moved, alive, self.extra)
        lost = take_places(self.x, self.place) - take_places(x, moved)
        return Tokens(x, size, moved, alive, self.extra, lost if self.detail is None else self.detail + lost)

    def moved(self, place: Tensor | None) -> Tensor | None:
        """`self.place` after a step that took the N tokens to the positions `place` (B, N)."""
        if self.place is None or place is None:
            return self.place
        moved = place.gather(1, self.place.clamp_min(0))
        return torch.where(self.place < 0, self.place, moved)


@dataclass(frozen=True)
class TokenModel:
    """What a method knows of the model it is built for.

    Attributes:
        depth, dim, num_heads: blocks, channels, heads of a block.
        prefix: names of the prefix tokens that the blocks see.
        grid: (H, W) of patches at the size that the model is made for.
        image_size: that size.
        in_chans: channels of the image.
        blocks: gives the blocks as `Block`s: for their widths, not to be kept.
    """

    depth: int
    dim: int
    num_heads: int
    prefix: tuple[str, ...]
    grid: Grid
    image_size: tuple[int, int]
    in_chans: int
    blocks: Callable[[], Sequence[Any]]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """N0 at the size that the model is made for."""
        return len(self.prefix) + self.patches


_Reduction = TypeVar('_Reduction', bound='type[Reduction]')

# every method by name; filled by `register_method`
METHODS: dict[str, type['Reduction']] = {}


def register_method(name: str) -> Callable[[_Reduction], _Reduction]:
    """Gives a subclass of `Reduction` the name that `reduce_tokens` knows it by."""

    def register(method: _Reduction) -> _Reduction:
        assert name not in METHODS, name
        method.method = name
        METHODS[name] = method
        return method

    return register


class Reduction(nn.Module):
    """Base of the methods.

    Args:
        model: what is reduced.
        schedule: how many tokens leave in which block.
    """

    method: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {'r': 8}  # the schedule of a caller who states none
    first_layer: ClassVar[int] = 0  # blocks before it do not reduce unless the caller says so
    least: ClassVar[int] = 0  # tokens that stay whatever the schedule says
    most: ClassVar[float] = 0.5  # share of the patches that one block can remove
    merges: ClassVar[bool] = False  # whether every token lives on in another, so that blocks can have all of them again
    overhead: ClassVar[tuple[str, ...]] = ()  # its methods that do what a block without reduction would not

    def __init__(self, *, model: TokenModel, schedule: Schedule):
        super().__init__()
        self.schedule, self.prefix, self.image_size = schedule, len(model.prefix), model.image_size
        self.recorded: list[Tokens] | None = None  # what left each block, where somebody wants to see it
        self.final: Tokens | None = None  # what left the last one, while training

    # ---- for methods to override

    def begin(self, x: Tensor, grid: Grid, track: bool) -> Tokens:
        """The tokens that enter the first block.

        Args:
            x: (B, N0, C), embedded.
            grid: (H, W) of the patches.
            track: `restore` will be called, so `place` is needed.
        """
        if not track:
            return Tokens(x)
        return Tokens(x, place=torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        """Block i; the definition of a method."""
        raise NotImplementedError

    def prefix_step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        """The last block where only the prefix tokens are read and nothing trains: those alone, in less time. A method
        whose `step` gives them other values than a block without reduction would overrides it."""
        query, key, value = block.split(tokens.x)
        out = block.attend(query[:, :, : self.prefix], key, value, self.bias(tokens))
        return Tokens(block.mix_channels(block.join(tokens.x[:, : self.prefix], out)))

    def restore(self, tokens: Tokens) -> Tensor:
        """(B, N0, C): a value for every token that entered: that of what it became part of, and what it differed from
        that when they merged. The residual sum of a token thus goes on past a merge: without further blocks, restoring
        undoes it; maps keep details that a merge blurs."""
        if tokens.place is None:
            return tokens.x
        x = take_places(tokens.x, tokens.place)
        return x if tokens.detail is None else x + tokens.detail

    def for_head(self, tokens: Tokens, prefix_alone: bool) -> Tensor:
        """What the classifier's norm and pooling read: prefix tokens first, and all others if it reads more."""
        return tokens.x if prefix_alone else self.restore(tokens)

    def bias(self, tokens: Tokens) -> Tensor | None:
        """What attention adds to its products, (B, 1, 1, N): log sizes, so that a token of size s weighs like s tokens;
        -inf for those that do not exist. None if there is nothing to add."""
        bias = None if tokens.size is None else tokens.size.log().transpose(1, 2)[:, None]
        if tokens.alive is None:
            return bias
        alive = tokens.alive[:, None, None, :]
        bias = torch.zeros_like(alive, dtype=tokens.x.dtype) if bias is None else bias
        return bias.masked_fill(~alive, float('-inf'))

    def penalties(self, tokens: Tokens) -> dict[str, Tensor]:
        """Terms, by name, that training adds to the task's loss, from the tokens after the last block."""
        return {}

    # ---- what the methods share

    @property
    def one_size_per_graph(self) -> bool:
        """Whether how many tokens leave follows from the image's size, so that no graph is of every size."""
        return any(self.schedule.amounts)

    def plain_step(self, tokens: Tokens, block: Block) -> Tokens:
        """A block without reduction."""
        query, key, value = block.split(tokens.x)
        mixed = block.join(tokens.x, block.attend(query, key, value, self.bias(tokens)))
        return tokens._replace(x=block.mix_channels(mixed))

    def remove(self, i: int, tokens: int) -> int:
        """How many of this many tokens leave in block i."""
        return self.schedule.remove(i, tokens, prefix=self.prefix, least=self.least, most=self.most)

    def run(
        self,
        blocks: Sequence[Block],
        x: Tensor,
        grid: Grid,
        *,
        call: Callable[..., Any],
        track: bool,
        wanted: Collection[int] = (),
        last: int | None = None,
        prefix_alone: bool = False,
    ) -> tuple[Tokens, list[Tensor]]:
        """The tokens after the blocks, up to block `last`, and the restored ones after each block in `wanted`.

        Args:
            call: `call(function, *arguments)`, which checkpoints if that is on.
            track: see `begin`.
            prefix_alone: see `prefix_step`.
        """
        again = self.schedule.restore_at
        tokens, kept = self.begin(x, grid, track or again is not None), []
        short = len(blocks) - 1 if prefix_alone and self.recorded is None and not self.training else None
        for i, block in enumerate(blocks):
            if i == again:
                tokens = self.begin(self.restore(tokens), grid, track)
            tokens = call(self.step if i != short else self.prefix_step, tokens, block, i)
            if self.recorded is not None:
                self.recorded.append(tokens)
                self.recorded_grid = grid
            if i in wanted:
                kept.append(self.restore(tokens))
            if i == last:
                break
        self.final = tokens if self.training else None
        return tokens, kept

    def extra_repr(self) -> str:
        return f'{self.method}, {self.schedule}'
