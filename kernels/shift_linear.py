"""Linear layers whose weights are signed powers of two: every product is a shift of a fixed-point number.

    out[m, o] = sum over i of sign[o, i] * (q(x[m, i]) >> depth[o, i]) + q(bias[o]),   >> keeping what it shifts out
    q(x) = clamp(floor(x * 2 ** f) / 2 ** f, -2 ** (n - 1), 2 ** (n - 1) - 1)            f fraction, n integer bits

with sign in {-1, 0, 1} and depth >= 0: the weight is sign * 2 ** -depth. Layout: x (..., K); out (..., N); weights
packed, one of two forms:

    5 bits (depth 0 to 14): 6 codes in an int32 word, 3 in each 16-bit half; weight (N, ceil(K / 6)) int32
    8 bits (depth 0 to 126): 4 codes in a word, one per byte;               weight (N, ceil(K / 4)) int32

A code is 0 for a weight of zero, else 1 + 2 depth + (1 if negative). Any K >= 1: the last word is padded with zeros.

With `terms=2` a weight is a sum of two powers, sign (f + g), f in {0, 1, 1/4, 1/16} and g in {0, 1/2, 1/8, 1/32}: two
shifts and an addition. Its code has 5 bits too: 16 if negative, plus 4 times the index of f, plus that of g.

Multiplying a float by 2 ** -depth is exact, so that a float matrix product computes what shifts and adds would, up to
the rounding of float32 sums; processors of today have no faster form (a test compares with integer shifts and adds).
What packing saves there is memory; the shifts pay off on hardware built for them: see the cost report.
Source: DeepShift, arXiv 1905.13298; ShiftAddViT, arXiv 2306.06446.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import fields
from .dispatch import exporting, refuse_triton, select

DEEPEST = {5: 14, 8: 126}  # of the shifts that codes of so many bits hold
PER_WORD = {5: 6, 8: 4}


def _powers(bits: int) -> Tensor:
    code = torch.arange(2**bits)
    size = 2.0 ** -((code - 1).clamp(min=0) // 2).double()
    return torch.where(code == 0, 0.0, size * (2.0 * (code % 2) - 1)).float()


_POWERS = {bits: _powers(bits) for bits in DEEPEST}  # (2 ** bits,): the weight of each code
_FIRST, _SECOND = torch.tensor([0, 1, 1 / 4, 1 / 16]), torch.tensor([0, 1 / 2, 1 / 8, 1 / 32])
_SUMS = torch.cat([sign * (_FIRST[:, None] + _SECOND).flatten() for sign in (1, -1)])  # (32,): the weight of each code
_WEIGHTS = {(5, 1): _POWERS[5], (8, 1): _POWERS[8], (5, 2): _SUMS}  # (bits, terms): the weight of each code
# terms: (32768, 3), the weights of the three codes in 15 bits
_THREES = {
    terms: _WEIGHTS[5, terms][(torch.arange(2**15)[:, None] >> torch.tensor([0, 5, 10])) & 31] for terms in (1, 2)
}


def pack_shifts(depth: Tensor, sign: Tensor, *, bits: int = 5) -> Tensor:
    """Packs signed powers of two.

    Args:
        depth: (N, K) whole numbers from 0 to 14 (5 bits) or 126 (8 bits): the weight's size is 2 ** -depth.
        sign: (N, K) of -1, 0, 1.
        bits: 5 or 8.

    Returns:
        (N, ceil(K / 6)) or (N, ceil(K / 4)) int32.

    Raises:
        ValueError: bits is neither, the shapes differ, or a value is out of range.
    """
    _check_bits(bits)
    if depth.ndim != 2 or depth.shape != sign.shape:
        raise ValueError(
            f'depth and sign must be (N, K) and of one shape, got {tuple(depth.shape)=}, {tuple(sign.shape)=}'
        )
    shifts, signs = depth.round().long(), sign.long()
    if not (torch.equal(shifts.to(depth), depth) and torch.equal(signs.sign().to(sign), sign)):
        raise ValueError('depth must hold whole numbers and sign -1, 0 or 1')
    if depth.numel() and not (int(shifts.min()) >= 0 and int(shifts.max()) <= DEEPEST[bits]):
        raise ValueError(
            f'depth must be from 0 to {DEEPEST[bits]} for {bits} bits, got {int(shifts.min())} to {int(shifts.max())}'
        )
    return _words(torch.where(signs == 0, 0, 1 + 2 * shifts + (signs < 0)), bits)


def pack_shift_sums(first: Tensor, second: Tensor, sign: Tensor) -> Tensor:
    """Packs sums of two signed powers of two, for `terms=2`.

    Args:
        first, second: (N, K) indices of the two terms in 0, 1, 1/4, 1/16 and in 0, 1/2, 1/8, 1/32.
        sign: (N, K) of -1, 0, 1.

    Returns:
        (N, ceil(K / 6)) int32.

    Raises:
        ValueError: the shapes differ, or a value is out of range.
    """
    if first.ndim != 2 or not first.shape == second.shape == sign.shape:
        shapes = ', '.join(str(tuple(x.shape)) for x in (first, second, sign))
        raise ValueError(f'first, second and sign must be (N, K) and of one shape, got {shapes}')
    indices, signs = torch.stack([first, second]).long(), sign.long()
    if not (torch.equal(indices & 3, torch.stack([first, second])) and torch.equal(signs.sign().to(sign), sign)):
        raise ValueError('first and second must hold 0, 1, 2 or 3 and sign -1, 0 or 1')
    return _words(torch.where(signs == 0, 0, 16 * (signs < 0) + 4 * indices[0] + indices[1]), 5)


def unpack_shifts(weight: Tensor, width: int, dtype: torch.dtype, *, bits: int = 5, terms: int = 1) -> Tensor:
    """The weights as numbers: (N, W) int32 to (N, width) of the type asked for."""
    _check_bits(bits, terms)
    if exporting():
        values = _WEIGHTS[bits, terms].to(weight.device)[fields(weight, _places(bits, weight.device), bits)]
    elif bits == 5:
        halves = weight.contiguous().view(torch.int16).int() & 0x7FFF
        values = _THREES[terms].to(weight.device).index_select(0, halves.flatten()).view(len(weight), -1)
    else:
        codes = weight.contiguous().view(torch.uint8).int()
        values = _POWERS[bits].to(weight.device).index_select(0, codes.flatten()).view(len(weight), -1)
    return values.flatten(1)[:, :width].to(dtype)


def fixed_point(x: Tensor, integer_bits: int = 16, fraction_bits: int = 16) -> Tensor:
    """x rounded down to a multiple of 2 ** -f within [-2 ** (n - 1), 2 ** (n - 1) - 1]."""
    steps, bound = 2.0**fraction_bits, 2.0 ** (integer_bits - 1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # x times 2 ** 16 may leave float16's range
    return ((wide * steps).floor() / steps).clamp(-bound, bound - 1).to(x.dtype)


def shift_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 5,
    terms: int = 1,
    fixed: tuple[int, int] = (16, 16),
    backend: str | None = None,
) -> Tensor:
    """A linear layer of signed powers of two, or of sums of two of them, packed. For inference.

    Args:
        x: (..., K) floating point.
        weight: (N, ceil(K / 6)) int32 for 5 bits, (N, ceil(K / 4)) for 8, from `pack_shifts` or `pack_shift_sums`.
        bias: (N,), or None.
        bits: of a weight's code, 5 or 8.
        terms: powers that a weight is the sum of, 1 or 2; sums have 5 bits.
        fixed: integer and fraction bits of inputs and bias.
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        (..., N) of the type of x.

    Raises:
        ValueError: a shape or type does not fit, or the backend asked for cannot take the call.
    """
    _check_bits(bits, terms)
    _check(x, weight, bias, bits)
    if select('shift_linear', backend, {'triton': can_run_triton(x, bias), 'torch': None}) == 'triton':
        from .triton_shift import shift_linear_triton  # Triton is imported where it is used

        return shift_linear_triton(x, weight, bias, bits=bits, terms=terms, fixed=fixed)
    return shift_linear_reference(x, weight, bias, bits=bits, terms=terms, fixed=fixed)


def shift_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 5,
    terms: int = 1,
    fixed: tuple[int, int] = (16, 16),
) -> Tensor:
    """The definition in plain PyTorch, the powers as numbers."""
    powers = unpack_shifts(weight, x.shape[-1], x.dtype, bits=bits, terms=terms)
    return F.linear(fixed_point(x, *fixed), powers, None if bias is None else fixed_point(bias, *fixed).to(x.dtype))


def can_run_triton(x: Tensor, bias: Tensor | None = None) -> str | None:
    """Why Triton cannot take this call."""
    if x.requires_grad and torch.is_grad_enabled():
        return 'x asks for a gradient, and the kernel is for inference alone'
    return refuse_triton({'x': x, 'bias': bias})


def _places(bits: int, device: torch.device) -> Tensor:
    """Where in a word each code begins."""
    places = [0, 5, 10, 16, 21, 26] if bits == 5 else [0, 8, 16, 24]
    return torch.tensor(places, device=device)


def _words(codes: Tensor, bits: int) -> Tensor:
    """(N, K) codes to (N, W) int32."""
    per = PER_WORD[bits]
    codes = F.pad(codes, (0, -codes.shape[1] % per)).unflatten(1, (-1, per))
    total = (codes << _places(bits, codes.device)).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _check_bits(bits: int, terms: int = 1) -> None:
    if bits not in DEEPEST:
        raise ValueError(f'bits must be 5 or 8, got {bits=}')
    if (bits, terms) not in _WEIGHTS:
        raise ValueError(f'terms must be 1, or 2 with 5 bits, got {terms=}, {bits=}')


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, bits: int) -> None:
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f'x must be floating point (..., K), got {x.dtype=}, {tuple(x.shape)=}')
    words = (x.shape[-1] + PER_WORD[bits] - 1) // PER_WORD[bits]
    if weight.ndim != 2 or weight.dtype != torch.int32 or weight.shape[1] != words:
        raise ValueError(
            f'weight must be int32 (N, {words}) for {x.shape[-1]} inputs of {bits} bits, '
            f'got {weight.dtype=}, {tuple(weight.shape)=}; see pack_shifts'
        )
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f'bias must be ({len(weight)},), one per output, got {tuple(bias.shape)=}')
