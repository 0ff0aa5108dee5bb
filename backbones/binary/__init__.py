"""Binarized and multiplication-free backbones, as they are trained: `binarize(model, method, **settings)`."""

from .bivit import parts_of, set_binary
from .convert import METHODS, binarize, create_binary
from .hashing import KernelHash, hashes_of
from .layers import BinaryLinear, BinaryProduct, ShiftLinear
from .mixture import MixtureLinear, balance_loss
from .pack import PackedBinaryLinear, PackedProduct, PackedShiftLinear, pack, packable
from .sums import ShiftSumLinear

__all__ = [
    'METHODS',
    'BinaryLinear',
    'BinaryProduct',
    'KernelHash',
    'MixtureLinear',
    'PackedBinaryLinear',
    'PackedProduct',
    'PackedShiftLinear',
    'ShiftLinear',
    'ShiftSumLinear',
    'balance_loss',
    'binarize',
    'create_binary',
    'hashes_of',
    'pack',
    'packable',
    'parts_of',
    'set_binary',
]
