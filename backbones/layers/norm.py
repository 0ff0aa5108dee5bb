"""Normalisations of (B, H, W, C) maps, built by name."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lookup import choose

NormFactory = Callable[[int], nn.Module]


class LayerNorm(nn.LayerNorm):
    """Over the channels of each position; `bias=False` keeps the weight alone."""

    def __init__(self, dim: int, *, eps: float = 1e-6, bias: bool = True):
        super().__init__(dim, eps=eps, bias=bias)


class JointNorm(nn.Module):
    """Over H, W and C of each image jointly, then a weight (and bias) per channel: GroupNorm with one group.

    Computed on the channels_last view, for which PyTorch has a kernel that reads the map as it lies in memory.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.permute(0, 3, 1, 2), 1, self.weight, self.bias, self.eps).permute(0, 2, 3, 1)


class BatchNorm(nn.BatchNorm2d):
    """Over all positions of each channel of (..., C), maps or tokens: nn.BatchNorm2d on the channels_last view."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if x.ndim != 4:
            x = x.reshape(-1, 1, 1, shape[-1])
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(shape)


NORMS: dict[str, NormFactory] = {
    'layer': LayerNorm,  # eps 1e-6
    'layer_no_bias': partial(LayerNorm, bias=False),
    'layer_eps5': partial(LayerNorm, eps=1e-5),
    'batch': BatchNorm,  # eps 1e-5
    'joint': JointNorm,  # eps 1e-5
    'joint_no_bias': partial(JointNorm, eps=1e-6, bias=False),
}


def norm_factory(name: str) -> NormFactory:
    """What makes the normalisation `name` for a number of channels.

    Raises:
        ValueError: no normalisation has this name.
    """
    return choose('norm', name, NORMS)
