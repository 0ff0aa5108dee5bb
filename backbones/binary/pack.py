"""Binarized models as they are deployed: weights of one bit 32 to a word, powers of two 6 to a word, state dicts too.

`pack(module)` replaces each trained layer by its packed form, which computes the same with the kernels of
`densezoo.kernels`; everything else is copied. A packed model has the class, the methods and the other keys of the
trained one; its checkpoint is its state dict, which loads into any model packed from the same architecture.

Exported programs hold the packed words as well, and unpack them with divisions and a remainder, since neither ONNX nor
TensorRT knows XNOR and popcount: what such a program multiplies are floating-point signs.
"""

# N outputs, K inputs, W words of a row
import copy
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...kernels import binary_linear, hamming_attention, pack_bits, pack_shifts, shift_linear
from ...kernels.dispatch import exporting
from .layers import BinaryLinear, BinaryProduct, ShiftLinear

_log = logging.getLogger('densezoo')
_Module = TypeVar('_Module', bound=nn.Module)


class PackedBinaryLinear(nn.Module):
    """A trained `BinaryLinear` with its weights as bits: (..., K) -> (..., N).

    Args:
        in_features, out_features: K and N, any.
        bias: whether there is one.
        input_signs: whether the input's signs are taken.

    Attributes:
        weight: (N, ceil(K / 32)) int32, set bits are 1, the others -1.
        affine: (2, N) the scale and the bias of each output, (1, N) without biases. One tensor, since each has a header
            in a checkpoint, which at a size of 1/32 counts.
        zeros: (Z,) int32, which weights are neither, as n K + k: those that were the mean of their row; None if there
            are none, as is usual.
    """

    weight: Tensor
    affine: Tensor
    zeros: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, input_signs: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.input_signs = in_features, out_features, input_signs
        words = (in_features + 31) // 32
        self.register_buffer('weight', torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer('affine', torch.ones(1 + bias, out_features))
        self.register_buffer('zeros', None)

    @classmethod
    def from_trained(cls, layer: BinaryLinear) -> 'PackedBinaryLinear':
        """The packed form of a layer whose weights are binary."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            input_signs=layer.input != 'float',
        )
        signs, scale = layer.signs(), layer.scale().clone()
        if layer.quantizer is not None:  # sign(x) times a learned number, which the scale takes over
            scale *= layer.quantizer(scale.new_ones(1))
        empty = ~signs.any(1)
        scale[empty] = 0  # a constant row: all of its weights are their mean
        packed.weight = pack_bits(signs > 0)
        packed.affine = torch.stack([scale] if layer.bias is None else [scale, layer.bias])
        zeros = ((signs == 0) & ~empty[:, None]).flatten().nonzero().flatten().to(torch.int32)
        packed.zeros = zeros if len(zeros) else None
        return packed

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self.affine[0], self.affine[1] if len(self.affine) > 1 else None
        out = binary_linear(x, self.weight, scale, bias, input_signs=self.input_signs)
        if self.zeros is None:
            return out
        # their bits say -1: what that took away is added again
        rows, columns = self.zeros // self.in_features, self.zeros % self.in_features
        met = x.index_select(-1, columns)
        return out.index_add(-1, rows, (met.sign() if self.input_signs else met) * scale[rows].to(x.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        zeros = state_dict.get(f'{prefix}zeros')  # how many there are differs from training to training
        self.zeros = None if zeros is None else torch.zeros_like(zeros, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f'{self.in_features}, {self.out_features}, bias={len(self.affine) > 1}, input_signs={self.input_signs}'
        )


class PackedShiftLinear(nn.Module):
    """A trained `ShiftLinear` with its weights as codes of 5 or 8 bits: (..., K) -> (..., N).

    Args:
        in_features, out_features: K and N, any.
        bias: whether there is one.
        bits: of a code: 5 for exponents down to -14, 8 down to -126.
        fixed: integer and fraction bits of the input.

    Attributes:
        weight: (N, ceil(K / 6)) int32 for 5 bits, (N, ceil(K / 4)) for 8, see `densezoo.kernels.shift_linear`.
        bias: (N,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        bits: int = 5,
        fixed: tuple[int, int] = (16, 16),
    ):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.fixed = in_features, out_features, bits, fixed
        nothing = torch.zeros(out_features, in_features)
        self.register_buffer('weight', pack_shifts(nothing, nothing, bits=bits))
        self.register_buffer('bias', torch.zeros(out_features) if bias else None)

    @classmethod
    def from_trained(cls, layer: ShiftLinear) -> 'PackedShiftLinear':
        """The packed form of a layer."""
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            bits=5 if layer.lowest >= -14 else 8,
            fixed=(layer.integer_bits, layer.fraction_bits),
        )
        exponents, signs = layer.exponents()
        packed.weight = pack_shifts(-exponents.float(), signs, bits=packed.bits)
        packed.bias = None if layer.bias is None else layer.bias.clone()
        return packed

    def forward(self, x: Tensor) -> Tensor:
        return shift_linear(x, self.weight, self.bias, bits=self.bits, fixed=self.fixed)

    def extra_repr(self) -> str:
        return f'{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}'


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
        options = {'scale': self.product.scale, 'threshold': threshold, 'bias': bias}
        return hamming_attention(query, key, value, **options)


_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    BinaryLinear: PackedBinaryLinear.from_trained,
    ShiftLinear: PackedShiftLinear.from_trained,
    BinaryProduct: PackedProduct,
}
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
    if not any(_packable(part) for part in module.modules()):
        raise ValueError(
            f'{type(module).__name__} has no binary or power-of-two weights to pack; binarize it first: '
            "binarize(model, 'bivit')"
        )
    with torch.no_grad():
        packed = _replaced(copy.deepcopy(module), {})
    return packed.requires_grad_(False).eval()  # type: ignore[return-value]


def _packable(part: nn.Module) -> bool:
    return isinstance(part, ShiftLinear) or (isinstance(part, BinaryLinear) and part.binary_weight)


def _replaced(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:  # a layer used in several places stays one layer
        return done[module]
    make = next((make for kind, make in _FORMS.items() if isinstance(module, kind)), None)
    if make is None or not (_packable(module) or isinstance(module, BinaryProduct)):
        for name, child in module.named_children():
            setattr(module, name, _replaced(child, done))
        done[module] = module
    else:
        done[module] = make(module)
    return done[module]
