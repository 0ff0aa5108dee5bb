"""timm's entry points of the names that timm does not have, so that timm.create_model finds them."""

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from torch import nn

__all__: list[str] = []  # timm appends the names it registers
default_cfgs: dict[str, Any] = {}


def add(name: str, cfgs: Sequence[PretrainedCfg], build: Callable[..., nn.Module]) -> None:
    """Registers `name` with timm: an entry point that calls `build(name, ...)`, and its weights."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained=pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f'densezoo.backbones.create_model({name!r})'
    tagged: dict[str, Any] = {f'{name}.{cfg.tag}': cfg for cfg in cfgs} or {name: PretrainedCfg()}
    default_cfgs.update(generate_default_cfgs(tagged))
    register_model(entry)
