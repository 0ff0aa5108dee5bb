"""Which registered models stand for their families in the default suite; the others are marked slow."""

from typing import Any

import pytest

from densezoo.backbones import list_models
from densezoo.backbones.registry import model_class

# one model of each kind of token mixer, for what takes seconds per model: pooling, convolutions, windows, attention to
# a smaller map, high and low frequencies, channel groups, recursive gates with filters, tokens
KINDS = (
    'poolformer_s12',
    'convformer_s18',
    'swin_tiny_patch4_window7_224',
    'pvt_v2_b0',
    'litv2_s',
    'davit_tiny',
    'hornet_tiny_gf',
    'deit_tiny_patch16_224',
)


def each_kind() -> list[Any]:
    """Every registered name as a pytest parameter: those of `KINDS` run by default."""
    assert set(KINDS) <= set(list_models())
    return [pytest.param(name, marks=[] if name in KINDS else [pytest.mark.slow]) for name in list_models()]


def each_model() -> list[Any]:
    """Every registered name as a pytest parameter: the first one of each class and first word runs by default."""
    seen, parameters = set(), []
    for name in list_models():
        family = model_class(name), name.split('_')[0]
        parameters.append(pytest.param(name, marks=[pytest.mark.slow] if family in seen else []))
        seen.add(family)
    return parameters
