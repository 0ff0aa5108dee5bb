"""Copies of models with some of their parts exchanged."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

_Model = TypeVar('_Model', bound=nn.Module)
_Part = TypeVar('_Part', bound=nn.Module)


def replaced(model: _Model, kind: type[_Part], make: Callable[[_Part], nn.Module]) -> _Model:
    """A copy of a model with `make(part)` in the place of each part of this class; the argument stays as it is."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))
    return model
