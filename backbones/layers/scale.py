"""What surrounds a branch: learnable scales per channel, and stochastic depth."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """A learnable factor per channel of the last dimension."""

    def __init__(self, dim: int, *, init: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def fold_scale(branch: nn.Module, scale: Scale | None) -> Scale | None:
    """Multiplies the output of `branch` by `scale` for good, where its class names the linear layer it ends with.

    Such a class has `last_linear`, the layer's name. Returns what is left to multiply by: None, or the scale itself.
    """
    name = getattr(branch, 'last_linear', None)
    if scale is None or name is None:
        return scale
    linear = branch.get_submodule(name)
    if not isinstance(linear, nn.Linear):  # exchanged for a layer of another kind
        return scale
    linear.weight.data = linear.weight.data * scale.scale.data[:, None]
    if linear.bias is not None:
        linear.bias.data = linear.bias.data * scale.scale.data
    return None


def drop_path_schedule(depths: Sequence[int], rate: float) -> list[list[float]]:
    """Stochastic depth that rises linearly from 0 at the first block to `rate` at the last one, per stage."""
    total = sum(depths)
    rates = [rate * k / max(total - 1, 1) for k in range(total)]
    starts = [sum(depths[:s]) for s in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths)]
