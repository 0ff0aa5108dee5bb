"""Finding the attention and the linear layers of a model, and putting others in their place."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from ..layers.linear import is_plain_linear


@dataclass(frozen=True)
class Place:
    """A submodule and where it hangs."""

    parent: nn.Module
    name: str
    module: nn.Module
    path: str


def attentions(model: nn.Module) -> list[Place]:
    """The attention layers of a model: what has heads."""
    return [
        Place(parent, name, child, f'{path}.{name}'.removeprefix('.'))
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if hasattr(child, 'num_heads')
    ]


def refuse(method: str, model: nn.Module, known: Collection[type[nn.Module]]) -> None:
    """Raises ValueError unless the model has attention, all of a known class."""
    found = attentions(model)
    names = ', '.join(sorted(kind.__name__ for kind in known))
    if not found:
        raise ValueError(f'{method} needs attention, and {type(model).__name__} has none; it takes {names}')
    for place in found:
        if type(place.module) not in known:
            raise ValueError(f'{method} has no form of {type(place.module).__name__} ({place.path}); it takes {names}')


def replace_attention(place: Place, module: nn.Module) -> None:
    """Puts a module in a place, in the mode of what was there."""
    setattr(place.parent, place.name, module.train(place.module.training))


def replace_linears(root: nn.Module, make: Callable[[nn.Linear], nn.Module], names: Collection[str] = ()) -> int:
    """Puts make(linear) in the place of each linear layer below `root`, those called so or all; their number."""
    count = 0
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if is_plain_linear(child) and (not names or name in names):
                setattr(parent, name, make(child))
                count += 1
    return count
