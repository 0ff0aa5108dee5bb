"""Adaptive polyphase anchoring: layers that cut a map into blocks see the same blocks however the image is shifted.

Reviving Shift Equivariance in Vision Transformers, arXiv 2306.07470. A strided layer sees another input when the image
moves by less than its stride. Anchored, it starts at the polyphase component with the largest norm, which moves with
the image: its output moves by whole blocks or not at all.

The norm is the sum of magnitudes, where the paper takes the Euclidean one: layer normalisation leaves all positions
with nearly the same Euclidean norm, so that rounding would choose.
"""

import torch
from torch import Tensor

from ...kernels.precision import full_precision
from .downsample import ConvDownsample
from .grid import to_first, to_last


def anchor(x: Tensor, period: int) -> Tensor:
    """Each image rolled by its own offset, to where blocks of period x period positions start with the largest norm.

    The component that starts at (t, l) holds the rows (t + i * period) % H, i < ceil(H / period), and columns alike.
    All starts compete, so sizes need not be multiples of the period: where they are not, the best start is the only
    one, and all shifts of an image give one and the same map.

    Args:
        x: (B, H, W, C), a map on a torus.

    Returns:
        (B, H, W, C); anchor(x.roll(shift, (1, 2)), period) is anchor(x, period) rolled by multiples of the period, or
        not at all in a direction that the period does not divide.
    """
    B, H, W, C = x.shape
    magnitude = x.detach().float().abs().sum(-1)
    with full_precision(x):  # equal norms after rounding would be chosen among by place
        # bmm: whether a matrix times matrices copies depends on the batch, which may be symbolic
        rows = torch.bmm(_component(H, period, x.device).expand(B, -1, -1), magnitude)
        norm = torch.bmm(rows, _component(W, period, x.device).t().expand(B, -1, -1))
    best = norm.flatten(1).argmax(1, keepdim=True)
    row = (torch.arange(H, device=x.device) + best // W) % H
    column = (torch.arange(W, device=x.device) + best % W) % W
    row = row + H * torch.arange(B, device=x.device)[:, None]
    position = W * row[:, :, None] + column[:, None, :]
    return x.reshape(B * H * W, C).index_select(0, position.flatten()).view(B, H, W, C)


def _component(size: int, period: int, device: torch.device) -> Tensor:
    """(size, size): entry (start, position) is 1 where the component of that start holds that position, else 0."""
    position = torch.arange(size, device=device)
    distance = (position[None, :] - position[:, None]) % size
    return (distance % period == 0).float()


class AnchoredDownsample(ConvDownsample):
    """A patch embedding whose patches start at the polyphase component with the largest norm."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.image:
            return super().forward(anchor(x, self.stride))
        return super().forward(to_first(anchor(to_last(x), self.stride)))
