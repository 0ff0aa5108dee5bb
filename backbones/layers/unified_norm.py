"""Unified Normalization for Accelerating and Stabilizing Transformers, arXiv 2208.01313.

Written from the paper and the facts of the authors' code, https://github.com/hikvision-research/Unified-Normalization
(Apache-2.0). A batch norm without a mean, whose scale while training is smoothed over the last batches and whose
gradient is approximate: it uses a moving average of what the exact one subtracts. In evaluation it is one factor and
one summand per channel, which `fold_norm` moves into the layer that follows. Differs: nothing branches on
values, so one compiled graph serves all of training; statistics are float32 whatever the input is.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .fold_norm import Affine
from .norm import NORMS

# C channels, N positions of the batch, k and m batches in the windows of the forward and of the backward pass

# gradients are not rescaled before this iteration
_EXACT_ITERATIONS = 1000


class UnifiedNorm(nn.Module):
    """out = weight * x / sqrt(v + eps) + bias on (..., C), v the mean of x^2 over all positions of a batch, smoothed.

    Training, at iteration t = 1, 2, ...: v is this batch's until t exceeds `warmup_iters` and the window, then the
    geometric mean over the last k batches. With `outlier_filtration` a batch after which arithmetic and geometric mean
    of the window differ by more than k times the variance of what was in it before is an outlier: it is normalised by
    its own v, and the window gets the running mean instead. Evaluation: v is the running mean.

    Buffers hold all state, so training resumes where it was: `running_var`, `ema_gz` (of the gradient's correction),
    `buffer_x2` (k, C), `buffer_gz` (m, C), `iters` and `skip_counter`. The forward pass writes them, so it cannot be
    repeated for activation checkpointing.

    Args:
        window: batches that are smoothed over, k = m, or (k, m).
        warmup_iters: iterations before smoothing and filtering start.
        momentum: of the old value in moving averages.
    """

    running_var: Tensor
    ema_gz: Tensor
    iters: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        dim: int,
        *,
        window: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
    ):
        super().__init__()
        forward, backward = (window, window) if isinstance(window, int) else tuple(window)
        if min(forward, backward) < 1 or not 0 <= momentum <= 1:
            raise ValueError(f'window must be positive and momentum from 0 to 1, got {window=}, {momentum=}')
        self.warmup_iters, self.outlier_filtration = warmup_iters, outlier_filtration
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer('running_var', torch.ones(dim))
        self.register_buffer('ema_gz', torch.zeros(dim))
        self.register_buffer('iters', torch.zeros(1, dtype=torch.long))
        self.register_buffer('buffer_x2', torch.zeros(forward, dim))
        self.register_buffer('buffer_gz', torch.zeros(backward, dim))
        self.register_buffer('skip_counter', torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalises (..., C); positions where pad_mask (...) is True are left out of the statistics."""
        if not self.training:
            scale, shift = self.affine()
            return torch.addcmul(shift, x, scale)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "norm='unified' changes its statistics in every forward pass, so activation checkpointing cannot "
                'repeat it; call set_grad_checkpointing(False)'
            )
        var, rescale, skip, now = self._observe(x.detach(), pad_mask)
        return _normalise(x, self.weight, self.bias, var, rescale, skip, now, self.ema_gz, self.buffer_gz, self._rule)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,): in evaluation out = scale * x + shift."""
        return self.weight * torch.rsqrt(self.running_var + self.eps), self.bias

    def for_deploy(self) -> Affine:
        """What replaces it in evaluation mode."""
        return Affine(*self.affine())

    @property
    def _rule(self) -> tuple[float, float, int]:
        return self.eps, self.momentum, self.warmup_iters

    @torch.no_grad()
    def _observe(self, x: Tensor, pad_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts a batch: its v (C,), the factor of its gradient (C,), whether averages leave it out, its number."""
        square = x.float().square().reshape(-1, x.shape[-1])
        if pad_mask is None:
            x2 = square.mean(0)
        else:
            inside = (~pad_mask).reshape(-1, 1).to(square.dtype)
            x2 = (square * inside).sum(0) / inside.sum()
        states = self.buffer_x2, self.running_var, self.iters, self.skip_counter
        var, rescale, skip, *new = _smooth(x2, *states, *self._rule, self.outlier_filtration)
        now = new[2]
        for state, value in zip(states, new):
            state.copy_(value)
        return var, rescale, skip, now

    def extra_repr(self) -> str:
        window = (len(self.buffer_x2), len(self.buffer_gz))
        return f'{len(self.weight)}, {window=}, warmup_iters={self.warmup_iters}'


# An operator of its own because the compiler's backward pass would otherwise repeat these steps from buffers that have
# moved on (torch 2.14 does).
@torch.library.custom_op('densezoo::unified_norm_smooth', mutates_args=())
def _smooth(
    x2: Tensor,
    buffer_x2: Tensor,
    running_var: Tensor,
    iters: Tensor,
    skip_counter: Tensor,
    eps: float,
    momentum: float,
    warmup_iters: int,
    outlier_filtration: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v, the gradient's factor and whether averages leave the batch out; the new values of the four states."""
    window = len(buffer_x2)
    now = iters + 1
    here = torch.arange(window, device=x2.device)[:, None] == now % window
    recent = torch.where(here, x2, buffer_x2)
    skip = torch.full_like(now, window == 1, dtype=torch.bool)
    skips = skip_counter.clone()
    if outlier_filtration:
        apart = recent.mean(0) - recent.log().mean(0).exp() > buffer_x2.sqrt().var() * window
        outlier = apart.any() & (now >= warmup_iters)
        recent = torch.where(here & outlier, running_var, recent)
        skips += outlier
        skip = skip | outlier
    alone = (now <= window) | (now < warmup_iters) | skip
    var = torch.where(alone, x2, recent.log().mean(0).exp())
    rescale = ((var + eps) / (running_var + eps)).sqrt().clamp(0.2, 5)
    rescale = torch.where((now <= max(_EXACT_ITERATIONS, warmup_iters)) | skip, 1.0, rescale)
    return var, rescale, skip, recent, momentum * running_var + (1 - momentum) * var, now, skips


@_smooth.register_fake
def _(
    x2: Tensor,
    buffer_x2: Tensor,
    running_var: Tensor,
    iters: Tensor,
    skip_counter: Tensor,
    eps: float,
    momentum: float,
    warmup_iters: int,
    outlier_filtration: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    skip = like(iters, dtype=torch.bool)
    return like(x2), like(x2), skip, like(buffer_x2), like(running_var), like(iters), like(skip_counter)


class _Normalise(torch.autograd.Function):
    """weight * x / sqrt(var + eps) + bias with the approximate gradient, whose averages the backward pass updates."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, var, rescale, skip, iters, ema_gz, buffer_gz, rule = inputs
        ctx.rule = rule
        ctx.save_for_backward(x, weight, var, rescale, skip, iters)
        ctx.averages = ema_gz, buffer_gz  # written in backward, so not among what autograd guards
        return torch.addcmul(bias, x, weight * torch.rsqrt(var + rule[0])).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, var, rescale, skip, iters = ctx.saved_tensors
        ema_gz, buffer_gz = ctx.averages
        eps, momentum, warmup = ctx.rule
        window, dim = buffer_gz.shape
        inverse = torch.rsqrt(var + eps)
        rows, values = gradient.float().reshape(-1, dim), x.float().reshape(-1, dim)
        grad_weight = (rows * values).sum(0) * inverse * rescale
        gz = weight * grad_weight / len(rows)
        here = torch.arange(window, device=x.device)[:, None] == iters % window
        buffer_gz.copy_(torch.where(here, torch.where(skip, ema_gz, gz), buffer_gz))
        alone = (iters <= window) | (iters < warmup) | skip
        mean_gz = torch.where(alone, gz, buffer_gz.mean(0))
        ema_gz.mul_(momentum).add_((1 - momentum) * mean_gz)
        removed = torch.where(skip, mean_gz, ema_gz)
        grad_x = torch.addcmul(rows * (weight * rescale * inverse), values, -removed * inverse * inverse)
        return (
            grad_x.reshape(x.shape).to(x.dtype), grad_weight, rows.sum(0), None, None, None, None, None, None, None
        )  # fmt: skip


@torch._dynamo.allow_in_graph
def _normalise(*inputs: Any) -> Tensor:
    return _Normalise.apply(*inputs)  # type: ignore[no-any-return]


NORMS['unified'] = partial(UnifiedNorm, outlier_filtration=True)  # as the authors' image classifiers
