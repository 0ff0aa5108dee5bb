"""The MetaFormer block: two residual branches, one that mixes tokens and one that mixes channels."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .fold_norm import fold_into_next
from .norm import NormFactory
from .scale import Scale, fold_scale


class MetaFormerBlock(nn.Module):
    """x = a * x + s * drop(mixer(norm(x))), then the same with the channel MLP; (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: channels.
        norm: makes a normalisation for a number of channels.
        mixer: token mixer, (B, H, W, C) -> (B, H, W, C).
        mlp: channel MLP on the last dimension.
        drop_path: probability of dropping a branch for an image while training.
        layer_scale: start value of a learnable s per channel; None leaves it out.
        res_scale: start value of a learnable a per channel; None leaves it out.
    """

    def __init__(
        self,
        *,
        dim: int,
        norm: NormFactory,
        mixer: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        res_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.token_mixer = mixer
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)
        self.layer_scale1 = Scale(dim, init=layer_scale) if layer_scale is not None else None
        self.layer_scale2 = Scale(dim, init=layer_scale) if layer_scale is not None else None
        self.res_scale1 = Scale(dim, init=res_scale) if res_scale is not None else None
        self.res_scale2 = Scale(dim, init=res_scale) if res_scale is not None else None

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self.token_mixer(self.norm1(x)), self.res_scale1, self.layer_scale1)
        return self._add(x, self.mlp(self.norm2(x)), self.res_scale2, self.layer_scale2)

    def for_deploy(self) -> nn.Module:
        """The same block in evaluation mode: layer scales inside the last linear layers of their branches, norms that
        are affine inside the first."""
        self.norm1 = fold_into_next(self.norm1, self.token_mixer)
        self.norm2 = fold_into_next(self.norm2, self.mlp)
        self.layer_scale1 = fold_scale(self.token_mixer, self.layer_scale1)
        self.layer_scale2 = fold_scale(self.mlp, self.layer_scale2)
        return self

    def _add(self, x: Tensor, branch: Tensor, res_scale: Scale | None, layer_scale: Scale | None) -> Tensor:
        branch = self.drop_path(branch)
        if layer_scale is not None and res_scale is None:
            return torch.addcmul(x, branch, layer_scale.scale)  # one pass over memory instead of two
        if layer_scale is not None:
            branch = layer_scale(branch)
        if res_scale is not None:
            return torch.addcmul(branch, x, res_scale.scale)
        return x + branch
