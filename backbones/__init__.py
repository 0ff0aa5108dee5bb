"""Backbones: image -> feature pyramid or logits. `create_model(name)` is the door, `list_models()` lists the names."""

from . import metaformer, poolformer
from .checkpoint import load_checkpoint
from .registry import create_model, list_models
from .sizes import AnySize, FixedSize, Resampled

__all__ = [
    'AnySize',
    'FixedSize',
    'Resampled',
    'create_model',
    'list_models',
    'load_checkpoint',
    'metaformer',
    'poolformer',
]
