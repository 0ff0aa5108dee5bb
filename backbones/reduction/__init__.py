"""Fewer tokens in plain backbones: `reduce_tokens(model, method, **settings)`. See `interface` for how it works and how
a method is written."""

from . import ats, mctf, pyra, sparsifiner, stvit, tome
from .interface import METHODS, Block, Reduction, TokenModel, Tokens, register_method
from .reduce import reduce_tokens
from .report import Report, recording, report, token_maps, trace_tokens, unreduced
from .schedule import Schedule

__all__ = [
    'METHODS',
    'Block',
    'Reduction',
    'Report',
    'Schedule',
    'TokenModel',
    'Tokens',
    'ats',
    'mctf',
    'pyra',
    'recording',
    'reduce_tokens',
    'register_method',
    'report',
    'sparsifiner',
    'stvit',
    'token_maps',
    'tome',
    'trace_tokens',
    'unreduced',
]
