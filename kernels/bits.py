"""Signs as bits: 32 of them in an int32 word, and tables that turn bytes of words back into numbers.

Bit i of word j holds element 32 j + i of the last axis; a width that is no multiple of 32 is padded with zero bits. In
memory the words are little-endian, so that byte b of a row holds its elements 8 b to 8 b + 7: reading bytes and looking
up eight numbers at once is the fast way back (0.2 ms for 3072 x 768 signs on one core, where shifting and masking them
one by one takes 3 ms).
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import exporting

WORD = 32  # bits
# (256, 8) int8: for each byte its eight signs
_SIGNS_OF_BYTES = (((torch.arange(256)[:, None] >> torch.arange(8)) & 1) * 2 - 1).to(torch.int8)


def words_for(width: int) -> int:
    """How many int32 words hold a row of `width` signs."""
    return (width + WORD - 1) // WORD


def pack_bits(bits: Tensor) -> Tensor:
    """Packs truth values 32 to a word.

    Args:
        bits: (..., K) bool.

    Returns:
        (..., ceil(K / 32)) int32; bit i of word j is element 32 j + i, bits beyond K are zero.

    Raises:
        ValueError: bits is not bool, or has no axis.
    """
    if bits.dtype != torch.bool or bits.ndim < 1:
        raise ValueError(f'bits must be bool (..., K), got {bits.dtype=}, {tuple(bits.shape)=}')
    width = bits.shape[-1]
    lanes = F.pad(bits, (0, words_for(width) * WORD - width)).unflatten(-1, (words_for(width), WORD))
    weight = torch.ones(WORD, dtype=torch.int64, device=bits.device) << torch.arange(WORD, device=bits.device)
    total = (lanes * weight).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def unpack_bits(words: Tensor, width: int) -> Tensor:
    """What `pack_bits` packed: (..., W) int32 to (..., width) bool."""
    return unpack_signs(words, width, torch.int8) > 0


def unpack_signs(words: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Set bits as 1, the others as -1.

    Args:
        words: (..., W) int32.
        width: K, at most 32 W; the bits beyond are left out.
        dtype: of the result.

    Returns:
        (..., K) of that type.
    """
    if exporting():
        table = _SIGNS_OF_BYTES.to(words.device, dtype)
        eights = table[fields(words, torch.tensor([0, 8, 16, 24], device=words.device), 8)]
        return eights.flatten(-3)[..., :width]
    table = _SIGNS_OF_BYTES.to(words.device).view(torch.int64).flatten()  # eight signs move as one number
    eights = table.index_select(0, _bytes(words).int().flatten())
    signs = eights.view(torch.int8).view(*words.shape[:-1], words.shape[-1] * WORD)
    return signs[..., :width].to(dtype)


def fields(words: Tensor, places: Tensor, bits: int) -> Tensor:
    """Parts of words in exported programs: (..., W) int32 to (..., W, P) int64, `bits` bits from each place on.

    By remainders, which every exporter knows, and a division that float32 does exactly: exporters know neither the
    bytes of integers nor shifts of signed ones, and divide integers in float32.
    """
    powers, words = 2**places, words.long().unsqueeze(-1)
    return ((words.remainder(powers * 2**bits) - words.remainder(powers)).float() / powers).long()


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int32 word, as int32: sums within pairs of bits, nibbles, bytes, then all four bytes."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24) & 0x3F


def _bytes(words: Tensor) -> Tensor:
    """(..., W) int32 as (..., 4 W) uint8, lowest bits first."""
    found = words.contiguous().view(torch.uint8)
    return found if sys.byteorder == 'little' else found.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
