"""Batch normalisation for Transformers: RepBN, and PRepBN, which becomes it while training. SLAB, arXiv 2405.11582.

Written from the paper and the facts of the authors' code, https://github.com/xinghaochen/SLAB (no licence is stated).
Differs: a PRepBN is a RepBN with a LayerNorm beside it, so one's weights load into the other (`flatten_prepbn`
renames the authors' keys); its share of LayerNorm is read from the authors' buffers and never changed by `forward`,
so that activation checkpointing and gradient accumulation count nothing twice: `train.hooks.NormSchedule` sets it from
the number of the training iteration, other training loops call `advance` after each.
"""

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fold_norm import Affine
from .norm import NORMS, LayerNorm

_Value = TypeVar('_Value')

# C channels, lambda the share of LayerNorm


class RepBN(nn.Module):
    """out = BatchNorm(x) + alpha * x on (..., C), alpha one learnable number; in evaluation one factor and one summand
    per channel, which `fold_norm` moves into the layer that follows."""

    def __init__(self, dim: int, *, eps: float = 1e-5):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.bn = nn.BatchNorm1d(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.bn(x.reshape(-1, x.shape[-1])).reshape(x.shape) + self.alpha * x
        scale, shift = self.affine()
        return torch.addcmul(shift, x, scale)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,): in evaluation out = scale * x + shift."""
        mean, var = self.bn.running_mean, self.bn.running_var
        assert mean is not None and var is not None
        factor = self.bn.weight * torch.rsqrt(var + self.bn.eps)
        return factor + self.alpha, self.bn.bias - mean * factor

    def for_deploy(self) -> Affine:
        """What replaces it in evaluation mode."""
        return Affine(*self.affine())


class PRepBN(RepBN):
    """Training: lambda * LayerNorm(x) + (1 - lambda) * RepBN(x) on (..., C), lambda falling linearly from 1 to 0.
    Evaluation: RepBN alone.

    Buffers, as the authors': `warm`, iterations left of LayerNorm alone, in which RepBN's statistics rest; `iter`,
    iterations left until lambda is 0; `total_step`, their number at the start. Both norms are computed in every
    training iteration, whatever lambda is, so every parameter has a gradient (DistributedDataParallel waits for all)
    and one compiled graph serves all of training.

    Args:
        eps: of the LayerNorm.
        warm, step: iterations of LayerNorm alone and those in which lambda falls, unless `set_progress` says otherwise.
    """

    warm: Tensor
    iter: Tensor
    total_step: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-6, warm: int = 0, step: int = 300_000):
        if warm < 0 or step < 1:
            raise ValueError(f'warm must not be negative and step be positive, got {warm=}, {step=}')
        super().__init__(dim)
        self.layer_norm = LayerNorm(dim, eps=eps)
        self.may_warm = warm > 0  # known without reading the buffer, which would make a GPU wait
        self.register_buffer('warm', torch.tensor(warm))
        self.register_buffer('iter', torch.tensor(step))
        self.register_buffer('total_step', torch.tensor(step))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        share = torch.where(self.warm > 0, 1.0, self.iter / self.total_step).to(x.dtype)
        batch = self._without_statistics(x) if self.may_warm else super().forward(x)
        return share * self.layer_norm(x) + (1 - share) * batch

    def _without_statistics(self, x: Tensor) -> Tensor:
        """RepBN with batch statistics, which reach the running ones only if the warm-up is over."""
        bn = self.bn
        assert bn.running_mean is not None and bn.running_var is not None
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
        out = F.batch_norm(x.reshape(-1, x.shape[-1]), mean, var, bn.weight, bn.bias, True, bn.momentum or 0.1, bn.eps)
        with torch.no_grad():
            bn.running_mean.copy_(torch.where(self.warm > 0, bn.running_mean, mean))
            bn.running_var.copy_(torch.where(self.warm > 0, bn.running_var, var))
        return out.reshape(x.shape) + self.alpha * x

    @torch.no_grad()
    def advance(self) -> None:
        """One training iteration is over."""
        warming = self.warm > 0
        self.iter -= (~warming & (self.iter > 0)).to(self.iter.dtype)
        self.warm -= warming.to(self.warm.dtype)

    @torch.no_grad()
    def set_progress(self, done: int, *, warm: int, steps: int) -> None:
        """`done` training iterations are over, of `warm` with LayerNorm alone and `steps` in which lambda falls."""
        self.may_warm = warm > done
        self.warm.fill_(max(warm - done, 0))
        self.iter.fill_(min(max(warm + steps - done, 0), steps))
        self.total_step.fill_(max(steps, 1))


NORMS['repbn'] = RepBN
NORMS['prepbn'] = PRepBN  # its LayerNorm's eps 1e-6
NORMS['prepbn_eps5'] = partial(PRepBN, eps=1e-5)


def flatten_prepbn(state: Mapping[str, _Value]) -> dict[str, _Value]:
    """A state dict with our names from one with the authors', whose LinearNorm holds `norm1`, a LayerNorm, and
    `norm2`, a RepBN."""
    nested = {
        key.removesuffix('norm2.alpha')
        for key in state
        if key.endswith('norm2.alpha') and key.removesuffix('norm2.alpha') + 'norm1.weight' in state
    }

    def new_name(key: str) -> str:
        for inner, ours in (('norm1.', 'layer_norm.'), ('norm2.', '')):
            prefix, found, rest = key.rpartition(inner)
            if found and prefix in nested and rest.startswith(('weight', 'bias', 'alpha', 'bn.')):
                return prefix + ours + rest
        return key

    return {new_name(key): value for key, value in state.items()}
