"""One door to the methods: `binarize(model, method, **settings)`."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..layers.lookup import choose, nearest
from ..registry import create_model
from .bivit import bivit
from .ecoformer import ecoformer
from .shiftadd import shiftadd

METHODS: dict[str, Callable[..., None]] = {'bivit': bivit, 'ecoformer': ecoformer, 'shiftadd': shiftadd}


def binarize(model: nn.Module, method: str, **settings: Any) -> nn.Module:
    """A binarized or multiplication-free copy of a backbone, ready to be trained; the argument stays as it is.

    Weights are loaded before: they become the start of the new layers. Weights of the copy, and those of the model it
    came from, load into it with `load_checkpoint`.

    Args:
        model: from `create_model`, as classifier or in dense form.
        method: 'bivit' (`bivit.bivit`), 'ecoformer' (`ecoformer.ecoformer`) or 'shiftadd' (`shiftadd.shiftadd`).
        settings: arguments of that function.

    Returns:
        The copy; its attribute `binary_method` names the method.

    Raises:
        ValueError: no such method, a setting's value is not allowed, the model is binarized already, or the method has
            no form of its layers.
        TypeError: the method has no such setting.
    """
    convert = choose('method', method, METHODS)
    done = getattr(model, 'binary_method', None)
    if done is not None:
        raise ValueError(
            f'the model is binarized already, by {done!r}; binarize what it came from with all settings at once'
        )
    accepted = [name for name in inspect.signature(convert).parameters if name != 'model']
    for name in settings:
        if name not in accepted:
            raise TypeError(f'{method} has no setting {name!r}{nearest(name, accepted)}; it has {", ".join(accepted)}')
    converted = copy.deepcopy(model)
    convert(converted, **settings)
    converted.binary_method = method  # type: ignore[assignment]
    return converted


def create_binary(name: str, *, method: str, settings: Mapping[str, Any] | None = None, **arguments: Any) -> nn.Module:
    """`binarize(create_model(name, **arguments), method, **settings)`, for configs."""
    return binarize(create_model(name, **arguments), method, **dict(settings or {}))
