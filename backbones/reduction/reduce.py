"""`reduce_tokens`: a copy of a model that runs with fewer tokens."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from timm.models._features import FeatureGetterNet
from torch import nn

from ..layers.lookup import choose, nearest
from ..macs import count_macs, on_meta
from .interface import METHODS, Reduction, TokenModel
from .schedule import SETTINGS, Schedule, make_schedule
from .timm_vit import REDUCED, describe_timm

_Model = TypeVar('_Model', bound=nn.Module)
_TOLERANCE = 0.004  # how far below its target a solved model's share of multiply-adds may lie


def reduce_tokens(model: _Model, method: str, **settings: Any) -> _Model:
    """A new model whose blocks merge, drop or skip tokens; the argument is untouched.

    Outputs keep their shapes: logits, and maps of full size, in which every position has the value of the token that it
    became part of. State-dict keys stay as they are; a method's learned parts lie below `reduction.`.

    Args:
        model: a plain backbone of densezoo's whose blocks attend to all tokens, or a timm VisionTransformer (also its
            `features_only` form), with its weights.
        method: 'tome', 'mctf', ...: see `densezoo.backbones.reduction.METHODS`.
        settings: the schedule, `r`, `ratio`, `target`, `layers`, `inflect`, `restore_at` (see `reduction.schedule`),
            and the method's own (see its class). `target` is a share of the model's multiply-adds at the size it is
            made for, and `img_size` another size to reach it at.

    Raises:
        ValueError: no such method; the model has no sequence of tokens or is reduced already; a schedule that asks for
            more tokens than there are, or a target out of reach.
        TypeError: no such setting.
    """
    kind = choose('method', method, METHODS)
    inner: Any = model.model if isinstance(model, FeatureGetterNet) else model
    if getattr(inner, 'reduction', None) is not None:
        raise ValueError(f'the model is reduced already, by {inner.reduction.method!r}; pass the one it was made from')
    facts = inner.token_model() if hasattr(inner, 'token_model') else describe_timm(inner)
    own = _own_settings(method, kind, settings)
    options = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    if not {'r', 'ratio', 'target'} & set(options):
        options = {**kind.defaults, **options}
    img_size, target = settings.get('img_size'), options.pop('target', None)
    if target is None:
        return _attached(model, kind(model=facts, schedule=_schedule(facts, kind, options), **own))
    size = (img_size, img_size) if isinstance(img_size, int) else img_size or facts.image_size
    return _solved(model, kind, facts, own, options, target, tuple(size))


def _own_settings(method: str, kind: type[Reduction], settings: Mapping[str, Any]) -> dict[str, Any]:
    accepted = [name for name in inspect.signature(kind).parameters if name not in ('model', 'schedule')]
    known = (*SETTINGS, 'img_size', *accepted)
    for name in settings:
        if name not in known:
            raise TypeError(
                f'method {method!r} has no setting {name}={settings[name]!r}{nearest(name, known)}; '
                f'it takes {", ".join(known)}'
            )
    return {name: settings[name] for name in accepted if name in settings}


def _schedule(facts: TokenModel, kind: type[Reduction], options: Mapping[str, Any]) -> Schedule:
    if options.get('restore_at') is not None and not kind.merges:
        merging = ', '.join(sorted(name for name, each in METHODS.items() if each.merges))
        raise ValueError(
            f'restore_at is for methods that merge tokens ({merging}), got restore_at={options["restore_at"]!r} for '
            f'method {kind.method!r}'
        )
    return make_schedule(
        depth=facts.depth,
        patches=facts.patches,
        prefix=facts.prefix,
        most=kind.most,
        first_layer=kind.first_layer,
        **options,
    )


def _attached(model: _Model, reduction: Reduction) -> _Model:
    reduced = copy.deepcopy(model)
    inner: Any = reduced.model if isinstance(reduced, FeatureGetterNet) else reduced
    first = next(inner.parameters())
    inner.reduction = reduction.to(device=first.device, dtype=first.dtype).train(inner.training)
    if type(inner) in REDUCED:
        inner.__class__ = REDUCED[type(inner)]
    return reduced


def _solved(
    model: _Model,
    kind: type[Reduction],
    facts: TokenModel,
    own: Mapping[str, Any],
    options: Mapping[str, Any],
    target: Any,
    size: tuple[int, int],
) -> _Model:
    """With an equal ratio in all blocks that needs just below `target` of the model's multiply-adds."""
    if 'r' in options or 'ratio' in options:
        raise ValueError(f'state one of r, ratio and target, got {target=} beside {options}')
    if not isinstance(target, int | float) or isinstance(target, bool) or not 0 < target <= 1:
        raise ValueError(f"target must be a share of the model's multiply-adds, above 0 and at most 1, got {target=}")
    light = on_meta(model)  # what is counted needs no weights

    def reduced(ratio: float) -> Reduction:
        return kind(model=facts, schedule=_schedule(facts, kind, {**options, 'ratio': ratio}), **own)

    def share(ratio: float) -> float:
        return count_macs(_attached(light, reduced(ratio)), size) / whole

    whole = count_macs(light, size)
    low, high = 0.0, float(kind.most)
    least = share(high)
    if least > target:
        raise ValueError(
            f'target must be at least {least:.3f}, the share of multiply-adds that is left when each block removes all '
            f'it can, got {target=}'
        )
    above, below = 1.0, least  # shares at low and high
    while below < target - _TOLERANCE and high - low > 1e-4:
        # nearly linear between the two; a little towards `high`, so that the next one is rarely above the target
        guess = low + (high - low) * min(1.02 * (above - target) / (above - below) + 0.002, 0.99)
        found = share(guess)
        low, above, high, below = (guess, found, high, below) if found > target else (low, above, guess, found)
    return _attached(model, reduced(high))
