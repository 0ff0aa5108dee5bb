"""Layers of binarized and multiplication-free transformers as they are trained: simulated in floating point.

`BinaryLinear` has weights of one bit and a scale per output row, `BinaryProduct` multiplies binary queries, keys,
values and attention maps, `ShiftLinear` has weights that are signed powers of two. What a packed form of each stores
has a method here: `signs()` and `scale()`, `exponents()`. Gradients: see `estimators`.
"""

# B batch, N tokens, M keys, h heads, d head width, I and O input and output features
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.lookup import choose
from .estimators import (
    ElasticQuantizer,
    fixed_point,
    nearest_power,
    power_of_two,
    sign,
    softmax_step,
    split_power,
    step,
)

INPUTS = ('sign', 'elastic', 'float')
SCALES = ('learned', 'mean')


class BinaryLinear(nn.Module):
    """out = scale * (sign(w - row mean of w) @ sign(x)) + bias on (..., I) -> (..., O). BiViT, arXiv 2211.07091.

    Args:
        in_features, out_features: any widths; a packed form pads them.
        bias: learn a bias (the authors' layers always do).
        input: 'sign' makes the input -1, 0 or 1; 'elastic' the same times a learned number (`ElasticQuantizer`);
            'float' leaves it.
        scale: of each output row: 'learned', starting at mean|w| of the row, or 'mean', that mean itself, which takes
            no part in the gradient.
        binary_weight: False leaves the weights floating point: out = w @ sign(x) + bias.

    Attributes:
        weight: (O, I), floating point, what is trained.
        bias: (O,) or None.
        scaling_factor: (O, 1), only with scale='learned'; loading zeros sets it to mean|w|.
        quantizer: the `ElasticQuantizer`, or None.
        active: False computes the linear layer that this one came from.
        part: of the model, 'attention', 'mlp' or 'merging'.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        input: str = 'sign',
        scale: str = 'learned',
        binary_weight: bool = True,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.input = choose('input', input, {name: name for name in INPUTS})
        self.scale_kind = choose('scale', scale, {name: name for name in SCALES})
        self.binary_weight = binary_weight
        self.active, self.part = True, ''
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.uniform_(self.weight, -0.015, 0.015)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.quantizer = ElasticQuantizer() if input == 'elastic' else None
        if binary_weight and scale == 'learned':
            self.scaling_factor = nn.Parameter(self.weight.detach().abs().mean(1, keepdim=True))
            self.register_load_state_dict_post_hook(_start_scale)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> 'BinaryLinear':
        """One with the weights of a linear layer; with a bias of zeros where that has none."""
        layer = cls(linear.in_features, linear.out_features, **options)
        layer = layer.to(linear.weight.device, linear.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if linear.bias is not None and layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.restart_scale()
        return layer.train(linear.training)

    def signs(self) -> Tensor:
        """(O, I) of -1, 0 and 1; 0 only where a weight is the mean of its row."""
        return sign(self.weight - self.weight.mean(1, keepdim=True))

    def scale(self) -> Tensor:
        """(O,)."""
        if self.scale_kind == 'learned':
            return self.scaling_factor.squeeze(1)
        return self.weight.detach().abs().mean(1)

    def binary_input(self, x: Tensor) -> Tensor:
        """What the weights meet."""
        if self.input == 'float':
            return x
        return sign(x) if self.quantizer is None else self.quantizer(x)

    @torch.no_grad()
    def restart_scale(self) -> None:
        """Learned scales start again at mean|w| of their rows."""
        if hasattr(self, 'scaling_factor'):
            self.scaling_factor.copy_(self.weight.abs().mean(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return F.linear(x, self.weight, self.bias)
        x = self.binary_input(x)
        if not self.binary_weight:
            return F.linear(x, self.weight, self.bias)
        # sums of signs are whole numbers: exact in any order, as in the packed form
        out = F.linear(x, self.signs()) * self.scale()
        return out if self.bias is None else out + self.bias

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """The weights of a linear layer are those of this one: adds the scale and the bias that they lack, in place."""
        weight = state.get(f'{prefix}weight')
        if weight is None:
            return
        if self.bias is not None:
            state.setdefault(f'{prefix}bias', weight.new_zeros(len(weight)))
        if hasattr(self, 'scaling_factor'):
            state.setdefault(f'{prefix}scaling_factor', weight.abs().mean(1, keepdim=True))

    def extra_repr(self) -> str:
        kind = f'scale={self.scale_kind!r}' if self.binary_weight else 'binary_weight=False'
        return f'{self.in_features}, {self.out_features}, bias={self.bias is not None}, input={self.input!r}, {kind}'


def _start_scale(layer: nn.Module, _: Any) -> None:
    assert isinstance(layer, BinaryLinear)
    if not layer.scaling_factor.is_meta and not layer.scaling_factor.any():
        layer.restart_scale()


class BinaryProduct(nn.Module):
    """out_i = sum over j of b_ij sign(v_j), b_ij = 1 where attention reaches its threshold, else 0. BiViT.

    The logits are sign(q_i) . sign(k_j) scale + bias_ij.

    Args:
        scale: of the products.
        map: 'softmax': b_ij = 1 where softmax(logits)_ij reaches `threshold` times the largest of row i, with the
            gradient of the softmax; 'step': where logits_ij > 0, without a softmax.
        threshold: see above.

    Attributes:
        active: False computes attention of the floating-point queries, keys and values.
    """

    def __init__(self, *, scale: float, map: str = 'softmax', threshold: float = 0.25):
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f'threshold must be above 0 and at most 1, got {threshold=}')
        self.scale, self.threshold, self.active = scale, threshold, True
        self.map = choose('map', map, {name: name for name in ('softmax', 'step')})

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, residual: Any = None
    ) -> Tensor:
        """(..., N, d), (..., M, d) and (..., M, d) -> (..., N, d).

        Args:
            bias: added to the scaled products, broadcast to (..., N, M); -inf leaves a key out.
            residual: pair of what is added to the products before scaling, broadcast to (..., N, M), and to the binary
                values, broadcast to (..., M, d); None adds nothing. See `residuals`.
        """
        if not self.active:
            return F.scaled_dot_product_attention(query, key, value, bias, scale=self.scale)
        products, value = sign(query) @ sign(key).transpose(-2, -1), sign(value)
        if residual is not None:
            products, value = products + residual[0], value + residual[1]
        logits = products * self.scale
        if bias is not None:
            logits = logits + bias
        chosen = softmax_step(logits, self.threshold) if self.map == 'softmax' else step(logits)
        return chosen @ value

    def extra_repr(self) -> str:
        return f'scale={self.scale:g}, map={self.map!r}, threshold={self.threshold:g}'


class ShiftLinear(nn.Module):
    """out = W fixed(x) + fixed(bias) with weights W = sign 2^shift, on (..., I) -> (..., O). DeepShift, 1905.13298.

    Inputs and bias are fixed-point numbers of `integer_bits` and `fraction_bits`, so that a product is a shift.

    Args:
        in_features, out_features: any widths.
        bias: learn a bias.
        form: 'ps' trains `shift` and `sign`, real numbers that are rounded; 'q' trains `weight`, which is rounded to
            the nearest power in the log domain (half to even), not to the nearest value.
        weight_bits: one bit of them is the sign; exponents of 'ps' go from -(2^(weight_bits - 1) - 2) to 0, of 'q' one
            below that.
        integer_bits, fraction_bits: of the input.

    Attributes:
        shift, sign: (O, I); `shift` stays within its range while training, as in the authors' code.
        weight: (O, I), with 'q'.
    """

    forms: ClassVar[tuple[str, ...]] = ('ps', 'q')

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        form: str = 'ps',
        weight_bits: int = 5,
        integer_bits: int = 16,
        fraction_bits: int = 16,
    ):
        super().__init__()
        if weight_bits < 3:
            raise ValueError(f'weight_bits must be at least 3, got {weight_bits=}')
        self.in_features, self.out_features = in_features, out_features
        self.form = choose('form', form, {name: name for name in self.forms})
        self.weight_bits, self.integer_bits, self.fraction_bits = weight_bits, integer_bits, fraction_bits
        self.add_weights((out_features, in_features))
        bound = in_features**-0.5
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> 'ShiftLinear':
        """One with the powers of two that are next to the weights of a linear layer."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)
        layer = layer.to(linear.weight.device, linear.weight.dtype)
        state = {key: value.detach() for key, value in linear.state_dict().items()}
        layer.resample(state, '')
        layer.load_state_dict(state)
        return layer.train(linear.training)

    def add_weights(self, shape: tuple[int, int]) -> None:
        """Makes what is trained."""
        if self.form == 'ps':
            self.shift = nn.Parameter(torch.empty(shape).uniform_(self.lowest, 0))
            self.sign = nn.Parameter(torch.empty(shape).uniform_(-1, 1))
        else:
            self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5))

    @property
    def lowest(self) -> int:
        """The smallest exponent."""
        return -(2 ** (self.weight_bits - 1) - 2) - (self.form == 'q')

    def power_weight(self) -> Tensor:
        """W, (O, I)."""
        if self.form == 'q':
            return nearest_power(self.weight, self.lowest)
        return power_of_two(self.shift, self.sign, self.lowest)

    def exponents(self) -> tuple[Tensor, Tensor]:
        """Exponents from `lowest` to 0 and signs -1, 0 or 1 of W, int8 (O, I)."""
        with torch.no_grad():
            shift, signs = split_power(self.power_weight())
        return shift.to(torch.int8), signs.to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not torch.compiler.is_compiling():
            self.clamp()
        bias = None if self.bias is None else fixed_point(self.bias, self.integer_bits, self.fraction_bits)
        return self.product(fixed_point(x, self.integer_bits, self.fraction_bits), bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Of fixed-point numbers."""
        return F.linear(x, self.power_weight(), bias)

    @torch.no_grad()
    def clamp(self) -> None:
        """Takes what is trained back into its range, in place."""
        if self.form == 'ps':
            self.shift.clamp_(self.lowest, 0)
            return
        signs = self.weight.sign()
        self.weight.copy_(self.weight.abs().clamp_(2.0**self.lowest, 1).mul_(signs))

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """The weights of a linear layer as this one keeps them, in place."""
        weight = state.get(f'{prefix}weight') if self.form == 'ps' else None
        if weight is not None:
            state[f'{prefix}shift'], state[f'{prefix}sign'] = split_power(weight)
            del state[f'{prefix}weight']

    def extra_repr(self) -> str:
        return (
            f'{self.in_features}, {self.out_features}, bias={self.bias is not None}, form={self.form!r}, '
            f'weight_bits={self.weight_bits}'
        )
