"""Fewer tokens in plain backbones: `reduce_tokens(model, method, **settings)`. See `interface` for how it works and how
a method is written."""

from . import ats, stvit, tome
from .interface import METHODS, Block, Reduction, TokenModel, Tokens, register_method
from .reduce import reduce_tokens
from .schedule import Schedule

__all__ = [
    'METHODS',
    'Block',
    'Reduction',
    'Schedule',
    'TokenModel',
    'Tokens',
    'ats',
    'reduce_tokens',
    'register_method',
    'stvit',
    'tome',
]
