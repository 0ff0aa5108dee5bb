"""PoolFormer's token mixer: out[b, i, j, c] = mean(x[b, u, v, c] for (u, v) in window(i, j)) - x[b, i, j, c].

window(i, j) holds the positions |u - i| <= r, |v - j| <= r, r = pool_size // 2, that lie inside the map: at the border
the mean is over fewer positions, never over zeros. Layout (B, H, W, C); any H, W >= 1, smaller than the window too.
Source: MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418, equation 4.
"""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import refuse_triton, select

# (weight (C,), bias (C,) or None, eps) of a normalisation over H, W and C jointly
JointNorm = tuple[Tensor, Tensor | None, float]


def pool_mixer(x: Tensor, pool_size: int = 3, *, norm: JointNorm | None = None, backend: str | None = None) -> Tensor:
    """Average pooling with stride 1 minus the input.

    Args:
        x: (B, H, W, C) floating point.
        pool_size: odd side of the window.
        norm: (weight, bias or None, eps): x is first normalised over H, W and C jointly (GroupNorm with one group).
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        (B, H, W, C) of the type of x.

    Raises:
        ValueError: x has not four dimensions, pool_size is not a positive odd number, the norm's weight is not (C,),
            or the backend asked for cannot take the call.
    """
    if x.ndim != 4:
        raise ValueError(f'x must be (B, H, W, C), got {tuple(x.shape)=}')
    if pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(f'pool_size must be a positive odd number, got {pool_size=}')
    if norm is not None and tuple(norm[0].shape) != (x.shape[-1],):
        raise ValueError(
            f'the weight of norm must be ({x.shape[-1]},), one value per channel, got {tuple(norm[0].shape)}'
        )
    if select('pool_mixer', backend, {'triton': can_run_triton(x, norm), 'torch': None}) == 'triton':
        from .triton_pool import pool_mixer_triton  # Triton is imported where it is used

        return pool_mixer_triton(x, pool_size, norm=norm)
    return pool_mixer_reference(x, pool_size, norm=norm)


def pool_mixer_reference(x: Tensor, pool_size: int = 3, *, norm: JointNorm | None = None) -> Tensor:
    """The definition in plain PyTorch. The (B, C, H, W) view has channels_last strides, on which pooling is fastest."""
    maps = x.permute(0, 3, 1, 2)
    if norm is not None:
        weight, bias, eps = norm
        maps = F.group_norm(maps, 1, weight, bias, eps)
    pooled = F.avg_pool2d(maps, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)
    return pooled.sub_(maps).permute(0, 2, 3, 1)  # in place: neither step's gradient needs its result


def can_run_triton(x: Tensor, norm: JointNorm | None) -> str | None:
    """Why Triton cannot take this call."""
    return refuse_triton({'x': x, "norm's weight": None if norm is None else norm[0]})
