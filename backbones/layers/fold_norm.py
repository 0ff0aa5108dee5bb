"""Norms that are one factor and one summand per channel in evaluation, folded into the layers beside them.

Such a norm has the method `affine`, giving (scale, shift); batch norms have both too. A layer that follows takes
W diag(scale) and W shift + bias, a layer before takes diag(scale) W and scale * bias + shift: exact, the second one for
RepBN too, where the authors' merging drops alpha * bias. Deployment alone: the layers are changed in place.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Affine(nn.Module):
    """out = scale * x + shift on (..., C): what is left of a norm that no layer could take."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer('scale', scale.detach().clone())
        self.register_buffer('shift', shift.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,)."""
        return self.scale, self.shift


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of a norm in evaluation mode; None if it depends on its input."""
    if isinstance(norm, _BatchNorm):
        return None if norm.running_mean is None else affine_of_batch_norm(norm)
    affine = getattr(norm, 'affine', None)
    return affine() if callable(affine) else None


def affine_of_batch_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm by its running statistics."""
    assert isinstance(norm, _BatchNorm) and norm.running_var is not None and norm.running_mean is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def fold_into_next(norm: nn.Module, branch: nn.Module) -> nn.Module:
    """Folds a norm into the layers that read its output, where all of them can take it.

    Args:
        norm: what is folded.
        branch: a linear layer, a convolution without padding, or a module whose attribute `first_linears` names the
            layers of this kind that alone read its input. If it has an attribute `outside`, what padded positions hold
            after the first of these layers, that keeps its value.

    Returns:
        What is left to apply before the branch: nn.Identity, or the norm itself.
    """
    affine = affine_of(norm)
    names = getattr(branch, 'first_linears', ())
    layers = [branch] if isinstance(branch, nn.Linear | nn.Conv2d) else [branch.get_submodule(name) for name in names]
    if affine is None or not layers or not all(_reads_all(layer) for layer in layers):
        return norm
    scale, shift = affine
    if hasattr(branch, 'outside') and branch.outside is None:
        bias: Tensor | None = layers[0].bias  # type: ignore[assignment]
        branch.outside = shift.new_zeros(len(layers[0].weight)) if bias is None else bias.detach().clone()  # type: ignore[arg-type]
    for layer in layers:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        grouped = weight.flatten(2).sum(2) if weight.ndim == 4 else weight
        _set(layer, weight * scale.view(-1, *(1,) * (weight.ndim - 2)), grouped @ shift, keep_bias=True)
    return nn.Identity()


@torch.no_grad()
def fold_into_previous(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Folds a norm into the linear layer or the convolution before it; returns nn.Identity, or the norm itself."""
    affine = affine_of(norm)
    if affine is None or not isinstance(layer, nn.Linear | nn.Conv2d):
        return norm
    scale, shift = affine
    bias = shift if layer.bias is None else shift + scale * layer.bias
    _set(layer, layer.weight * scale.view(-1, *(1,) * (layer.weight.ndim - 1)), bias, keep_bias=False)
    return nn.Identity()


def _reads_all(layer: nn.Module) -> bool:
    """Whether every output is a sum over inputs that are all there: no padding, one group."""
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.padding in (0, (0, 0), 'valid') and layer.groups == 1
    )


def _set(layer: nn.Module, weight: Tensor, bias: Tensor, *, keep_bias: bool) -> None:
    if keep_bias and layer.bias is not None:
        bias = bias + layer.bias  # type: ignore[operator]
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
