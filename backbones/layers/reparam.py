"""Structural re-parameterization: branches that train side by side and deploy as one convolution.

RepVGG, arXiv 2101.03697; MobileOne, arXiv 2206.04040. A convolution with batch norm is linear once the norm's
statistics are fixed, a grouped convolution is a dense one whose weight is block diagonal, and a small kernel is a
large one with zeros around it; so the sum of them all is a single convolution.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import inferring
from .fold_norm import affine_of_batch_norm
from .replace import replaced

_Model = TypeVar('_Model', bound=nn.Module)


class RepConv(nn.Module):
    """sum over branches of norm(conv(x)), plus norm(x) where shapes allow; (B, C, H, W), maps of ceil(size / stride).

    In eager inference the branches are merged call by call; while training, compiling and exporting they run as they
    are. `for_deploy` gives the one convolution for good.

    Args:
        in_dim, dim: channels.
        branches: (odd kernel, groups) of each convolution. The first is the widest: the merged convolution has its
            kernel and groups, so the other kernels are not larger and the other groups are multiples.
        identity: whether a branch is the normalised input itself; None: where channels and stride keep its shape.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        branches: Sequence[tuple[int, int]] = ((1, 1),),
        stride: int = 1,
        identity: bool | None = None,
    ):
        super().__init__()
        kernel, groups = branches[0]
        for k, g in branches:
            if k > kernel or k % 2 == 0 or g % groups or in_dim % g or dim % g:
                raise ValueError(
                    f'branches must be (odd kernel, groups) with groups that divide the channels, the first one '
                    f'widest, got branches={tuple(branches)} for {in_dim} to {dim} channels'
                )
        keeps_shape = in_dim == dim and stride == 1
        if identity and not keeps_shape:
            raise ValueError(f'identity=True needs equal channels and stride 1, got {in_dim=}, {dim=}, {stride=}')
        self.kernel, self.groups, self.stride = kernel, groups, stride
        self.convs = nn.ModuleList(
            nn.Conv2d(in_dim, dim, k, stride if k > 1 else 1, k // 2, groups=g, bias=False) for k, g in branches
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in branches)
        self.skip = nn.BatchNorm2d(dim) if keeps_shape and identity is not False else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and inferring():
            return F.conv2d(x, *self.merged_weights(), self.stride, self.kernel // 2, groups=self.groups)
        out: Tensor = sum(norm(self._branch(conv, x)) for conv, norm in zip(self.convs, self.norms))  # type: ignore
        return out if self.skip is None else out + self.skip(x)

    def _branch(self, conv: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv2d)
        if conv.kernel_size == (1, 1) and self.stride > 1 and not torch.compiler.is_exporting():
            # on a CPU the gradient of narrow 1x1 convolutions with a stride writes outside its memory (torch 2.14)
            return conv(x[:, :, :: self.stride, :: self.stride])
        return F.conv2d(x, conv.weight, None, self.stride, conv.padding, groups=conv.groups)

    def merged_weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution, with the norms' running statistics."""
        weights, biases = [], []
        conv: Any
        for conv, norm in zip(self.convs, self.norms):
            factor, shift = affine_of_batch_norm(norm)
            weights.append(self._widened(conv.weight, conv.groups) * factor[:, None, None, None])
            biases.append(shift)
        if self.skip is not None:
            factor, shift = affine_of_batch_norm(self.skip)
            dim, inputs = weights[0].shape[:2]
            eye = torch.eye(inputs, dtype=factor.dtype, device=factor.device).repeat(dim // inputs, 1)
            weights.append(self._centred((eye * factor[:, None])[:, :, None, None]))
            biases.append(shift)
        return torch.stack(weights).sum(0), torch.stack(biases).sum(0)

    @torch.no_grad()
    def for_deploy(self) -> nn.Conv2d:
        """The one convolution that replaces the branches in evaluation mode."""
        weight, bias = self.merged_weights()
        conv = nn.Conv2d(
            weight.shape[1] * self.groups,
            weight.shape[0],
            self.kernel,
            self.stride,
            self.kernel // 2,
            groups=self.groups,
            device=weight.device,
            dtype=weight.dtype,
        )
        conv.weight.copy_(weight)
        assert conv.bias is not None
        conv.bias.copy_(bias)
        return conv

    def _widened(self, weight: Tensor, groups: int) -> Tensor:
        """The weight of a branch with `groups` groups as one of the merged groups and kernel."""
        parts = groups // self.groups  # groups of the branch within each merged group
        if parts > 1:
            dim, inputs, k, _ = weight.shape
            blocks = weight.reshape(self.groups, parts, dim // groups, 1, inputs, k, k)
            diagonal = torch.eye(parts, dtype=weight.dtype, device=weight.device).reshape(1, parts, 1, parts, 1, 1, 1)
            weight = (blocks * diagonal).reshape(dim, parts * inputs, k, k)
        return self._centred(weight)

    def _centred(self, weight: Tensor) -> Tensor:
        margin = (self.kernel - weight.shape[-1]) // 2
        return F.pad(weight, (margin, margin, margin, margin)) if margin else weight


def merge_branches(model: _Model) -> _Model:
    """A copy in evaluation mode whose `RepConv`s are plain convolutions; the argument stays as it is."""
    return replaced(model, RepConv, RepConv.for_deploy).eval()
