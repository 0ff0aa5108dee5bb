"""Binarized models as they are deployed: weights of one bit 32 to a word, powers of two and their sums 6
to a word, state dicts too.

`pack(module)` replaces each trained layer by its packed form, which computes the same with the kernels of
`densezoo.kernels`; everything else is copied. A packed model has the class, the methods and the other keys of the
trained one; its checkpoint is its state dict, which loads into any model packed from the same architecture.

Exported programs hold the packed words as well, and unpack them with divisions and a remainder, since neither ONNX nor
TensorRT knows XNOR and popcount: what such a program multiplies are floating-point signs.
"""

# N outputs, K inputs, W words of a row
import copy
import logging
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...kernels import (
    binary_linear,
    fixed_point,
    hamming_attention,
    pack_bits,
    pack_shift_sums,
    pack_shifts,
    shift_linear,
)
from ...kernels.dispatch import exporting
from .bivit import BinaryAttention
from .layers import BinaryLinear, BinaryProduct, ShiftLinear
from .sums import ShiftSumLinear

_log = logging.getLogger('densezoo')
_Module = TypeVar('_Module', bound=nn.Module)


class PackedBinaryLinear(nn.Module):
    """A trained `BinaryLinear` with its weights as bits: (..., K) -> (..., N).

    Args:
        in_features, out_features: K and N, any.
        bias: whether there is one.
        input_signs: whether the input's signs are taken.
        output_signs: whether the signs of the outputs alone are used: then they come without their scale.

    Attributes:
        weight: (N, ceil(K / 32)) int32, set bits are 1, the others -1.
        scale: (N,), or None where the signs of the outputs alone are used.
        bias: (N,) or None.
        zeros: (Z,) int32, which weights are neither, as n K + k: those that were the mean of their row; None if there
            are none, as is usual.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        input_signs: bool = True,
        output_signs: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.input_signs, self.output_signs = input_signs, output_signs
        words = (in_features + 31) // 32
        self.register_buffer('weight', torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer('scale', None if output_signs else torch.ones(out_features))
        self.register_buffer('bias', torch.zeros(out_features) if bias else None)
        self.register_buffer('zeros', None)

    @classmethod
    def from_trained(cls, layer: BinaryLinear, *, output_signs: bool = False) -> 'PackedBinaryLinear':
        """The packed form of a layer whose weights are binary; `output_signs` needs scales that are not zero."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            input_signs=layer.input != 'float',
            output_signs=output_signs,
        )
        signs, scale, bias = _plain(layer)
        if output_signs:  # sign(scale sum + bias) = sign(sum + bias / scale), where the scale is positive
            signs, bias = signs * scale.sign()[:, None], None if bias is None else bias / scale.abs()
        else:
            packed.scale = scale
        packed.weight, packed.bias = pack_bits(signs > 0), bias
        zeros = (signs == 0).flatten().nonzero().flatten().to(torch.int32)
        packed.zeros = zeros if len(zeros) else None
        return packed

    def forward(self, x: Tensor) -> Tensor:
        if exporting():
            _say_what_is_exported()
        out = binary_linear(x, self.weight, self.scale, self.bias, input_signs=self.input_signs)
        if self.zeros is None:
            return out
        # their bits say -1: what that took away is added again
        rows, columns = self.zeros // self.in_features, self.zeros % self.in_features
        met = x.index_select(-1, columns)
        met = met.sign() if self.input_signs else met
        return out.index_add(-1, rows, met if self.scale is None else met * self.scale[rows].to(x.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        zeros = state_dict.get(f'{prefix}zeros')  # how many there are differs from training to training
        self.zeros = None if zeros is None else torch.zeros_like(zeros, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f'{self.in_features}, {self.out_features}, bias={self.bias is not None}, '
            f'input_signs={self.input_signs}, output_signs={self.output_signs}'
        )


class PackedShiftLinear(nn.Module):
    """A trained `ShiftLinear` or `ShiftSumLinear` with its weights as codes of 5 or 8 bits: (..., K) -> (..., N).

    Args:
        in_features, out_features: K and N, any.
        bias: whether there is one.
        bits: of a code: 5 for exponents down to -14, 8 down to -126.
        terms: powers that a weight is the sum of: 2 for a `ShiftSumLinear`, with 5 bits.
        fixed: integer and fraction bits of the input.

    Attributes:
        weight: (N, ceil(K / 6)) int32 for 5 bits, (N, ceil(K / 4)) for 8, see `densezoo.kernels.shift_linear`.
        scale: (), of sums, or None.
        bias: (N,) or None.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        bits: int = 5,
        terms: int = 1,
        fixed: tuple[int, int] = (16, 16),
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.terms, self.fixed = bits, terms, fixed
        nothing = torch.zeros(out_features, in_features)
        self.register_buffer('weight', pack_shifts(nothing, nothing, bits=bits))
        self.register_buffer('scale', torch.ones(()) if terms == 2 else None)
        self.register_buffer('bias', torch.zeros(out_features) if bias else None)

    @classmethod
    def from_trained(cls, layer: ShiftLinear) -> 'PackedShiftLinear':
        """The packed form of a layer."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            bits=5 if layer.lowest >= -14 else 8,
            terms=2 if isinstance(layer, ShiftSumLinear) else 1,
            fixed=(layer.integer_bits, layer.fraction_bits),
        )
        if isinstance(layer, ShiftSumLinear):
            packed.weight, packed.scale = pack_shift_sums(*layer.terms()), layer.scale()
        else:
            exponents, signs = layer.exponents()
            packed.weight = pack_shifts(-exponents.float(), signs, bits=packed.bits)
        packed.bias = None if layer.bias is None else layer.bias.clone()
        return packed

    def forward(self, x: Tensor) -> Tensor:
        if exporting():
            _say_what_is_exported()
        if self.scale is None:
            return shift_linear(x, self.weight, self.bias, bits=self.bits, fixed=self.fixed)
        out = shift_linear(x, self.weight, bits=self.bits, terms=self.terms, fixed=self.fixed) * self.scale.to(x.dtype)
        return out if self.bias is None else out + fixed_point(self.bias, *self.fixed).to(out.dtype)

    def extra_repr(self) -> str:
        described = f'{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}'
        return described if self.terms == 1 else f'{described}, terms={self.terms}'


class PackedProduct(nn.Module):
    """A trained `BinaryProduct` on the kernel of binary attention; see there for the arguments of `forward`."""

    def __init__(self, product: BinaryProduct):
        super().__init__()
        self.product = product

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, residual: Any = None
    ) -> Tensor:
        if residual is not None:  # floating-point terms inside the product: no kernel has them
            return self.product(query, key, value, bias, residual)
        threshold = self.product.threshold if self.product.map == 'softmax' else None
        return hamming_attention(query, key, value, scale=self.product.scale, threshold=threshold, bias=bias)


_PACKED = (PackedBinaryLinear, PackedShiftLinear, PackedProduct)


def pack(module: _Module) -> _Module:
    """A deployable copy with packed weights; the argument is untouched.

    Args:
        module: a model, or a layer, from `binarize`, trained, in evaluation mode. Layers with binary inputs but
            floating-point weights (`binary_weight=False`) stay as they are.

    Returns:
        The packed copy, in evaluation mode and without gradients; its outputs are those of the argument up to the
        rounding of floating-point sums.

    Raises:
        ValueError: the module is in training mode, is packed already, or holds no layer that can be packed.
    """
    training = next((name for name, part in module.named_modules() if part.training), None)
    if training is not None:
        where = f'its part {training!r}' if training else 'it'
        raise ValueError(f'pack needs a module in evaluation mode, and {where} is in training mode; call .eval() first')
    if any(isinstance(part, _PACKED) for part in module.modules()):
        raise ValueError(f'{type(module).__name__} is packed already')
    if not packable(module):
        raise ValueError(
            f'{type(module).__name__} has no binary or power-of-two weights to pack; binarize it first: '
            "binarize(model, 'bivit')"
        )
    with torch.no_grad():
        packed = _replaced(copy.deepcopy(module), {})
    return packed.requires_grad_(False).eval()  # type: ignore[return-value]


def packable(module: nn.Module) -> bool:
    """Whether a module holds weights of one bit, powers of two or sums of them that `pack` would pack."""
    return any(_packable(part) for part in module.modules())


@lru_cache(maxsize=1)
def _say_what_is_exported() -> None:
    _log.warning(
        'XNOR, popcount and shifts have no ONNX form: packed layers are exported as floating-point products; '
        'their weights stay packed in the file, and are unpacked when it is loaded'
    )


def _packable(part: nn.Module) -> bool:
    return isinstance(part, ShiftLinear) or (isinstance(part, BinaryLinear) and part.binary_weight)


def _replaced(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:  # a layer used in several places stays one layer
        if isinstance(module, BinaryAttention) and _packable(module.qkv) and bool(_plain(module.qkv)[1].all()):
            done[module.qkv] = PackedBinaryLinear.from_trained(module.qkv, output_signs=True)
        done[module] = _packed(module)
        if done[module] is module:
            for name, child in module.named_children():
                setattr(module, name, _replaced(child, done))
    return done[module]


def _packed(module: nn.Module) -> nn.Module:
    if isinstance(module, BinaryLinear) and module.binary_weight:
        return PackedBinaryLinear.from_trained(module)
    if isinstance(module, ShiftLinear):
        return PackedShiftLinear.from_trained(module)
    return PackedProduct(module) if isinstance(module, BinaryProduct) else module


def _plain(layer: BinaryLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Signs (N, K), scales and biases (N,) of a layer whose input is signs or floating point."""
    signs, scale = layer.signs(), layer.scale().clone()
    if layer.quantizer is not None:  # sign(x) times a learned number, which the scale takes over
        scale *= layer.quantizer(scale.new_ones(1))
    empty = ~signs.any(1)  # a constant row: all of its weights are their mean
    scale[empty] = 0
    return signs.masked_fill(empty[:, None], 1), scale, None if layer.bias is None else layer.bias.clone()
