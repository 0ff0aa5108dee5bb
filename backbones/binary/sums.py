"""Shift layers whose weights are sums of two powers of two: SP2, or additive powers of two (APoT).

    w = c s (s_1 4^a + s_2 4^b / 2),    a, b in {0, -1, -2},  s_1, s_2 in {0, 1},  s in {-1, 0, 1}

so that a product is two shifts and an addition; the scale c is one multiplication per output. The largest sum is 3/2,
and c = 2/3 makes it 1. Smaller weights keep fewer digits than a single power of two has: the smallest is 1/48, and one
below 1/96 becomes 0.

APoT, arXiv 1909.13144; the two forms are those of the option SP2 of https://github.com/GATECH-EIC/ShiftAddViT
(Apache-2.0), at the 5 bits that its table has. Differs: the learned scale of a trained layer starts at its largest
weight (there at 1).
"""

# I and O input and output features
import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...kernels.dispatch import exporting
from ..layers.lookup import choose
from .estimators import learns
from .layers import ShiftLinear

SCALE = 2 / 3
LOWEST = -2  # of a and b
# the two terms as they are counted in 32nds, none first, in the order of the authors' table
_FIRST, _SECOND = (0, 32, 8, 2), (0, 16, 4, 1)
_ORDER = [first + second for second in _SECOND for first in _FIRST]
_SUMS = sorted(_ORDER)


def _thresholds() -> list[float]:
    """The largest float32 whose nearest sum is the lower one of a pair.

    At equal distances, of float32 values as the authors have them, the one that comes first in their table.
    """
    values = (torch.tensor(_SUMS) / 32 * (1 / torch.tensor(1.5))).tolist()
    found = []
    for i, (low, high) in enumerate(pairwise(values)):
        middle, upper_first = (low + high) / 2, _ORDER.index(_SUMS[i + 1]) < _ORDER.index(_SUMS[i])
        last = torch.tensor(middle)  # float32
        if last.item() > middle or (last.item() == middle and upper_first):
            last = last.nextafter(torch.zeros(()))
        found.append(last.item())
    return found


_THRESHOLDS = torch.tensor(_thresholds())
_VALUES = torch.tensor(_SUMS) / 32


def nearest_sum(x: Tensor) -> Tensor:
    """The sum of two signed powers that is nearest to x / SCALE; gradients pass as if it were x / SCALE.

    Args:
        x: floating point; sizes above 1 count as 1.
    """
    return _NearestSum.apply(x) if learns(x) else _nearest(x)


def sum_of_powers(shift_1: Tensor, shift_2: Tensor, sign_1: Tensor, sign_2: Tensor, sign: Tensor) -> Tensor:
    """s (s_1 4^a + s_2 4^b / 2), what is real rounded half to even: a and b within -2 .. 0, s_1 and s_2 within 0 .. 1.

    Clamping and rounding pass all gradients: d/dshift is the shift's term times ln 4; d/dsign_1 = d/dsign_2 = s, as the
    authors have it (not the term's size), and d/dsign = 1 / SCALE, 1 of the scaled weight.
    """
    parts = shift_1, shift_2, sign_1, sign_2, sign
    if any(learns(part) for part in parts):
        return _SumOfPowers.apply(*parts)
    first, second, signs = _terms(*parts)
    return (first + second) * signs


def split_sum(x: Tensor) -> dict[str, Tensor]:
    """What `sum_of_powers` makes `nearest_sum(x)` of again, by its argument names; the shift of an absent term is 0."""
    with torch.no_grad():
        count = (_nearest(x).abs() * 32).long()
        parts = {'sign': x.sign()}
        for name, digits, largest in (('1', _FIRST, 32), ('2', _SECOND, 16)):
            term = count & sum(digits)
            parts[f'sign_{name}'] = (term > 0).to(x.dtype)
            parts[f'shift_{name}'] = (term.clamp(min=1).to(x.dtype) / largest).log2().div(2).where(term > 0, 0)
    return parts


class ShiftSumLinear(ShiftLinear):
    """out = c S fixed(x) + fixed(bias) with weights S that are sums of two powers, on (..., I) -> (..., O).

    Args:
        in_features, out_features: any widths.
        bias: learn a bias.
        form: 'sp2' trains the shifts and signs of both terms, real numbers that are rounded; 'apot' trains `weight`
            and a scale of the whole layer, and rounds to the nearest sum.
        weight_bits: 5, what a sum takes.
        integer_bits, fraction_bits: of the input.

    Attributes:
        shift_1, shift_2, sign_1, sign_2, sign: (O, I), with 'sp2'; but for `sign` they stay within their ranges while
            training.
        weight: (O, I), with 'apot'; weights larger than the scale count as the scale.
        weight_alpha: (), with 'apot': c is 2/3 of it. Of a trained layer it starts at the largest weight.

    Raises:
        ValueError: no such form, or weight_bits is not 5.
    """

    forms: ClassVar[tuple[str, ...]] = ('sp2', 'apot')
    shift_1: nn.Parameter
    shift_2: nn.Parameter
    sign_1: nn.Parameter
    sign_2: nn.Parameter

    def __init__(self, in_features: int, out_features: int, *, form: str = 'sp2', weight_bits: int = 5, **options: Any):
        if weight_bits != 5:
            raise ValueError(f'weight_bits must be 5, what a sum of two powers takes, got {weight_bits=}, {form=}')
        super().__init__(in_features, out_features, form=form, weight_bits=weight_bits, **options)

    def add_weights(self, shape: tuple[int, int]) -> None:
        if self.form == 'apot':
            self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5))
            self.weight_alpha = nn.Parameter(torch.ones(()))
            return
        for name, low, high in (('shift', LOWEST, 0), ('sign', 0, 1)):
            for term in ('1', '2'):
                self.register_parameter(f'{name}_{term}', nn.Parameter(torch.empty(shape).uniform_(low, high)))
        self.sign = nn.Parameter(torch.empty(shape).uniform_(-1, 1))

    @property
    def lowest(self) -> int:
        """The smallest exponent."""
        return 2 * LOWEST - 1

    def power_weight(self) -> Tensor:
        """S, (O, I)."""
        if self.form == 'apot':
            return nearest_sum((self.weight / self.weight_alpha).clamp(-1, 1))
        return sum_of_powers(self.shift_1, self.shift_2, self.sign_1, self.sign_2, self.sign)

    def scale(self) -> Tensor:
        """c, ()."""
        if self.form == 'apot':
            return self.weight_alpha * SCALE
        return self.sign.new_tensor(SCALE)

    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of S, each int8 (O, I): which powers its terms have, 0 for none and else 1 - a and 1 - b, and signs."""
        with torch.no_grad():
            parts = split_sum(self.power_weight() * SCALE)
        first, second = ((1 - parts[f'shift_{term}']) * parts[f'sign_{term}'] for term in ('1', '2'))
        return first.to(torch.int8), second.to(torch.int8), parts['sign'].to(torch.int8)

    def exponents(self) -> tuple[Tensor, Tensor]:
        raise TypeError('weights that are sums of two powers have no one exponent; see terms()')

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(x, self.power_weight()) * self.scale()
        return out if bias is None else out + bias.to(out.dtype)

    @torch.no_grad()
    def clamp(self) -> None:
        """Takes what is trained back into its range, in place."""
        if self.form == 'sp2':
            for shift in (self.shift_1, self.shift_2):
                shift.clamp_(LOWEST, 0)
            for sign in (self.sign_1, self.sign_2):
                sign.clamp_(0, 1)

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """The weights of a linear layer as this one keeps them, in place."""
        weight = state.get(f'{prefix}weight')
        if weight is None:
            return
        if self.form == 'apot':
            largest = weight.detach().abs().max()
            state.setdefault(f'{prefix}weight_alpha', torch.where(largest > 0, largest, 1))
            return
        del state[f'{prefix}weight']
        state.update({f'{prefix}{name}': value for name, value in split_sum(weight).items()})


SHIFTS: dict[str, type[ShiftLinear]] = {form: kind for kind in (ShiftLinear, ShiftSumLinear) for form in kind.forms}


def shift_layer(linear: nn.Linear, *, form: str = 'ps', weight_bits: int = 5) -> ShiftLinear:
    """The shift layer of a form, 'ps', 'q', 'sp2' or 'apot', with the weights of a linear layer.

    Raises:
        ValueError: no such form, or it has no weights of so many bits.
    """
    return choose('form', form, SHIFTS).from_linear(linear, form=form, weight_bits=weight_bits)


class _NearestSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _nearest(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / SCALE


class _SumOfPowers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        first, second, signs = _terms(*parts)
        ctx.save_for_backward(first, second, signs)
        return (first + second) * signs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        first, second, signs = ctx.saved_tensors
        inner = grad * signs
        shift = inner * math.log(4)
        return shift * first, shift * second, inner, inner, grad / SCALE


def _terms(
    shift_1: Tensor, shift_2: Tensor, sign_1: Tensor, sign_2: Tensor, sign: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    first, second = (
        torch.exp2(2 * shift.clamp(LOWEST, 0).round()) * present.clamp(0, 1).round()
        for shift, present in ((shift_1, sign_1), (shift_2, sign_2))
    )
    return first, second / 2, sign.round().sign()


def _nearest(x: Tensor) -> Tensor:
    size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    thresholds, values = _THRESHOLDS.to(size), _VALUES.to(size)
    if exporting():  # comparisons, which every exporter has
        sums = (size.unsqueeze(-1) > thresholds).to(size) @ values.diff()
    else:
        sums = values[torch.bucketize(size, thresholds)]
    return sums.to(x.dtype) * x.sign()
