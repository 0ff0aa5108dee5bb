"""How many tokens leave in which block: the language that all methods share.

    r=8                         8 in each block
    r=(8, 0, 0, 16)             block by block; blocks that are not listed remove none
    r=8, inflect=-1.0           from 16 in the first block down to 0 in the last; 1.0 the reverse (ToMe)
    ratio=0.1                   a tenth of the patches that are left, in each block
    ratio=(0.3, 0.0, 0.3)       block by block
    target=0.6                  that ratio, equal in all blocks, with which the model needs 0.6 of its multiply-adds
    layers=(3, 6, 9)            in these blocks alone, with any of the above; lists then have one entry for each of them
    restore_at=10               all tokens again from block 10 on, with any of the above, for methods that merge: those
                                of dense tasks then attend to each other at full resolution before the head reads them.
                                Expediting Large-Scale Vision Transformer for Dense Prediction, arXiv 2210.01035

Prefix tokens are never removed, and a block removes at most a method's share of the patches (half of them where tokens
are merged in pairs).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

# the settings that make a schedule
SETTINGS = ('r', 'ratio', 'target', 'layers', 'inflect', 'restore_at')


@dataclass(frozen=True)
class Schedule:
    """Amounts per block: whole numbers of tokens, or shares (float) of the patches that are left.

    Attributes:
        active: the blocks that the settings speak of, for methods that may act where the amount is 0.
        restore_at: the block that all tokens enter again; None if none does.
    """

    amounts: tuple[int | float, ...]
    active: tuple[int, ...] = ()
    restore_at: int | None = None

    def remove(self, i: int, tokens: int, *, prefix: int, least: int = 0, most: float = 0.5) -> int:
        """How many tokens leave in block i.

        Args:
            tokens: that enter it, prefix tokens included.
            prefix: how many of them are prefix tokens.
            least: tokens that stay in any case.
            most: share of the patches that can leave.
        """
        amount, patches = self.amounts[i], tokens - prefix
        r = int(amount * patches) if isinstance(amount, float) else amount
        return max(min(r, tokens - least, int(most * patches)), 0)

    def with_amount(self, amount: int | float) -> 'Schedule':
        """The same blocks, each with this amount."""
        return replace(self, amounts=tuple(amount if before else before for before in self.amounts))

    def __str__(self) -> str:
        same = set(self.amounts)
        if len(same) == 1:
            return f'{self.amounts[0]:.4g} per block'
        listed = 'per block ' + ', '.join(f'{amount:.4g}' for amount in self.amounts)
        return listed if self.restore_at is None else f'{listed}, all again at {self.restore_at}'


def make_schedule(
    *,
    depth: int,
    patches: int,
    prefix: Sequence[str],
    most: float,
    first_layer: int = 0,
    r: Any = None,
    ratio: Any = None,
    layers: Any = None,
    inflect: Any = None,
    restore_at: Any = None,
) -> Schedule:
    """The schedule that the settings describe, see the top of this file.

    Args:
        depth: blocks.
        patches: that enter the first block.
        prefix: names of the prefix tokens.
        most: the share of the patches that one block can remove.
        first_layer: the first block that reduces where neither `layers` nor a list says so.

    Raises:
        TypeError, ValueError: one line with the setting, its value and what is allowed.
    """
    name, value = ('r', r) if r is not None else ('ratio', ratio)
    if (r is None) == (ratio is None):
        raise ValueError(f'state one of r, ratio and target, got {r=}, {ratio=}')
    reducing = depth if restore_at is None else _restoring(restore_at, depth)
    active = _layers(layers, reducing) if layers is not None else tuple(range(first_layer, reducing))
    if inflect is not None:
        if name != 'r' or not _is_count(r) or not isinstance(inflect, int | float) or not -1 <= inflect <= 1:
            raise ValueError(f'inflect must be from -1 to 1, beside a whole number r, got {inflect=}, {r=}')
        value, layers = _inflected(r, float(inflect), len(active)), active
    amounts: list[int | float] = [0] * depth
    if isinstance(value, list | tuple):
        places = tuple(range(reducing)) if layers is None else active
        if len(value) > len(places):
            raise ValueError(f'{name} must have at most {len(places)} entries, one per block, got {len(value)}')
        active = places[: len(value)]
        for place, amount in zip(places, value):
            amounts[place] = amount
    else:
        for place in active:
            amounts[place] = value
    for amount in amounts:
        if name == 'r':
            _check_r(amount, value, patches, prefix)
        elif isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount <= most:
            raise ValueError(f'ratio must be from 0 to {most:g}, what one block can remove, got {ratio=}')
    return Schedule(tuple(amounts if name == 'r' else map(float, amounts)), active, restore_at)


def _check_r(amount: Any, given: Any, patches: int, prefix: Sequence[str]) -> None:
    if not _is_count(amount):
        raise TypeError(f'r must be a whole number of tokens, or one per block, got r={given!r}')
    if amount > patches:
        stays = f' ({" and ".join(prefix)} stay{"" if len(prefix) > 1 else "s"})' if prefix else ''
        raise ValueError(f'r must be at most {patches}, the patches that there are{stays}, got r={given!r}')


def _restoring(block: Any, depth: int) -> int:
    if not _is_count(block) or not 1 <= block < depth:
        raise ValueError(f'restore_at must be a block from 1 to {depth - 1}, got restore_at={block!r}')
    return int(block)


def _layers(layers: Any, depth: int) -> tuple[int, ...]:
    valid = isinstance(layers, list | tuple) and all(isinstance(i, int) and -depth <= i < depth for i in layers)
    chosen = tuple(i + depth if i < 0 else i for i in layers) if valid else ()
    if not valid or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f'layers must be increasing block numbers from 0 to {depth - 1}, got {layers=}')
    return chosen


def _inflected(r: int, inflect: float, count: int) -> tuple[int, ...]:
    """Evenly from r (1 - inflect) to r (1 + inflect), rounded down."""
    first = int(r * (1 - inflect))
    step = 2 * (r - first) / max(count - 1, 1)
    return tuple(int(first + step * i) for i in range(count))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
