"""What names of arguments mean in every family, checked once before a model is built.

Families check what only they know (which heads divide which width); here is what a name says by itself: counts are
whole numbers, rates lie between 0 and 1, a window is not larger than the map it lies on.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .layers.grid import ceil_div
from .skeleton import per_stage

_COUNTS = {'in_chans': 1, 'num_classes': 0, 'stem_dim': 1, 'stem_depth': 0, 'kernel': 1, 'groups': 1, 'head_dim': 1}
_COUNTS_PER_STAGE = ('num_heads', 'window_size', 'group_size', 'split_size', 'interval', 'sr_ratios', 'reductions')
_RATES = ('drop_path_rate', 'drop_rate')
_FACTORS = ('mlp_ratio', 'mlp_ratios', 'conv_ratio', 'down_ratio')
# sides of squares on a stage's map
_SIDES = ('window_size', 'group_size', 'split_size', 'sr_ratios', 'reductions')


def check_arguments(
    arguments: Mapping[str, Any],
    *,
    given: Collection[str],
    image: tuple[int, int],
    strides: Sequence[int],
    staged: bool,
) -> None:
    """Refuses arguments that no model can be built with.

    Args:
        arguments: all arguments of the model's class that are not left to their defaults.
        given: names of those that the caller stated; published variants may have windows larger than small maps.
        image: height and width that the model is made for, unless `arguments` state them as img_size.
        strides: of the stages.
        staged: the model has stages; otherwise one value serves all blocks, and windows may be larger than the map.

    Raises:
        TypeError, ValueError: one line with the argument, its value and what is allowed.
    """
    for name, least in _COUNTS.items():
        if arguments.get(name) is not None and (not _is_count(arguments[name]) or arguments[name] < least):
            raise ValueError(f'{name} must be a whole number from {least} on, got {name}={arguments[name]!r}')
    for name in _RATES:
        if name in arguments and not (_is_number(arguments[name]) and 0 <= arguments[name] < 1):
            raise ValueError(f'{name} must be from 0 to below 1, got {name}={arguments[name]!r}')
    for name in _FACTORS:
        if name in arguments and not all(_is_number(v) and v > 0 for v in _values(arguments[name])):
            raise ValueError(f'{name} must be positive, got {name}={arguments[name]!r}')
    for name in ('depths', 'dims'):
        if name in arguments and not isinstance(arguments[name], list | tuple):
            raise ValueError(f'{name} must be {len(strides)} positive numbers, got {name}={arguments[name]!r}')
    for name in _COUNTS_PER_STAGE:
        if name in arguments and not staged and not (arguments[name] is None or _is_count(arguments[name])):
            raise ValueError(f'{name} must be a whole number, got {name}={arguments[name]!r}')
        if name in arguments and not all(v is None or _is_count(v) for v in _values(arguments[name])):
            raise ValueError(
                f'{name} must be a whole number, one for all stages or one per stage, got {name}={arguments[name]!r}'
            )
    if 'mixers' in arguments and not isinstance(arguments['mixers'], str | Mapping | list | tuple | None):
        raise TypeError(
            'mixers must be a name or dict(name=..., option=...), one for all stages or one per stage, '
            f'got mixers={arguments["mixers"]!r}'
        )
    size = _image_size(arguments.get('img_size'), image)
    if staged:
        _check_sides(arguments, given, size, strides)


def _check_sides(
    arguments: Mapping[str, Any], given: Collection[str], image: tuple[int, int], strides: Sequence[int]
) -> None:
    """One side for all stages has to fit the first map, since smaller ones are filled up; one per stage its own."""
    for name in _SIDES:
        if name not in given or arguments.get(name) is None:
            continue
        value = arguments[name]
        alike = not isinstance(value, list | tuple)
        for s, (side, stride) in enumerate(zip(per_stage(name, value, len(strides)), strides)):
            height, width = (ceil_div(n, strides[0] if alike else stride) for n in image)
            if side is not None and side > max(height, width):
                where = 'the largest map' if alike else f'the map of stage {s}'
                raise ValueError(
                    f'{name} must be at most {max(height, width)}, the side of {where} at img_size={image}, '
                    f'got {name}={value!r}; pass img_size= for larger images'
                )


def _image_size(given: Any, default: tuple[int, int]) -> tuple[int, int]:
    if given is None:
        return default
    size = (given, given) if _is_count(given) else given
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(_is_count(n) and n >= 32 for n in size)):
        raise ValueError(f'img_size must be one or two whole numbers from 32 on, got img_size={given!r}')
    return size[0], size[1]


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
