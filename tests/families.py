"""Which registered models stand for their families in the default suite; the others are marked slow."""

from typing import Any

import pytest

from densezoo.backbones import list_models
from densezoo.backbones.registry import model_class


def each_model() -> list[Any]:
    """Every registered name as a pytest parameter: the first one of each class and first word runs by default."""
    seen, parameters = set(), []
    for name in list_models():
        family = model_class(name), name.split('_')[0]
        parameters.append(pytest.param(name, marks=[pytest.mark.slow] if family in seen else []))
        seen.add(family)
    return parameters
