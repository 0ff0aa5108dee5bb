"""Binarized and multiplication-free backbones, as they are trained: `binarize(model, method, **settings)`."""

from .bivit import parts_of, set_binary
from .convert import METHODS, binarize, create_binary
from .layers import BinaryLinear, BinaryProduct, ShiftLinear

__all__ = [
    'METHODS',
    'BinaryLinear',
    'BinaryProduct',
    'ShiftLinear',
    'binarize',
    'create_binary',
    'parts_of',
    'set_binary',
]
