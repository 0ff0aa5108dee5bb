"""Restormer: Zamir et al. 2022, arXiv 2111.09881: attention between channels instead of pixels, for large pictures.

Authors' code: swz30/Restormer (academic public licence, non-commercial), whose keys are ours. Variants: 'with_bias'
norms (deraining, deblurring, real denoising), 'bias_free' (Gaussian denoising). Differs: sizes that 8 does not divide
are mirrored inside; `scale`.
The block serves any backbone through `UNetRestorer(block='restormer')`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ushaped import ChannelNorm, UShaped

# B batch, C channels, H W size of the current level, h heads, c = C / h


class ChannelAttention(nn.Module):
    """Multi-Dconv head transposed attention: softmax(t q k^T) v over the c channels of each head.

    q and k are scaled to unit length over the pixels; t is learnt per head. The cost grows with H W, not its square.

    Args:
        dim, num_heads: C and h.
        bias: convolutions have one.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.project_out(channel_attention(self.qkv_dwconv(self.qkv(x)), self.temperature))


class GatedConvMLP(nn.Module):
    """Gated-Dconv feed-forward network: W (GELU(a) * b), where a and b come from a 1x1 and a depthwise 3x3.

    Args:
        dim: C.
        expansion: width of a and of b over C, rounded down.
        bias: convolutions have one.
    """

    def __init__(self, dim: int, *, expansion: float = 2.66, bias: bool = False):
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(gate) * value)


class RestormerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (B, C, H, W).

    Args:
        dim, num_heads: C and h.
        expansion: of `GatedConvMLP`.
        bias: convolutions have one.
        norm: see `ChannelNorm`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, expansion: float = 2.66, bias: bool = False, norm: str = 'with_bias'
    ):
        super().__init__()
        self.norm1 = ChannelNorm(dim, norm=norm)
        self.attn = ChannelAttention(dim, num_heads, bias=bias)
        self.norm2 = ChannelNorm(dim, norm=norm)
        self.ffn = GatedConvMLP(dim, expansion=expansion, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Restormer(UShaped):
    """The whole network; `Restorer(backbone=dict(type=Restormer, ...), head=dict(type=OwnRestorer))` trains it.

    Args:
        dim, depths, refinement, num_heads, bias, in_chans, out_chans, scale: see `UShaped`.
        expansion: of the blocks' `GatedConvMLP`.
        norm: 'with_bias' or 'bias_free'.
        dual_pixel: dual-pixel defocus deblurring: two views of 3 channels come in (in_chans=6), the first map is
            added before the last convolution, and no picture after it.
    """

    def __init__(
        self,
        *,
        dim: int = 48,
        depths: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        bias: bool = False,
        norm: str = 'with_bias',
        in_chans: int = 3,
        out_chans: int = 3,
        scale: int = 1,
        dual_pixel: bool = False,
    ):
        def block(width: int, heads: int) -> nn.Module:
            return RestormerBlock(width, heads, expansion=expansion, bias=bias, norm=norm)

        super().__init__(
            encoder=block,
            decoder=block,
            dim=dim,
            depths=depths,
            refinement=refinement,
            num_heads=num_heads,
            bias=bias,
            in_chans=in_chans,
            out_chans=out_chans,
            scale=scale,
        )
        self.skip_conv = nn.Conv2d(dim, 2 * dim, 1, bias=bias) if dual_pixel else None

    def restore(self, images: Tensor) -> Tensor:
        if self.skip_conv is None:
            return super().restore(images)
        first, maps, latent = self.encode(images)
        return F.pixel_shuffle(self.output(self.decode(maps, latent) + self.skip_conv(first)), self.scale)


def channel_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    """(B, 3C, H, W) of queries, keys and values, and (h, 1, 1) -> (B, C, H, W): attention over each head's channels."""
    height, width = qkv.shape[-2:]
    heads = len(temperature)
    query, key, value = (x.unflatten(1, (heads, -1)).flatten(3) for x in qkv.chunk(3, 1))  # (B, h, c, HW)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    weights = (query @ key.transpose(-2, -1) * temperature).softmax(-1)
    return (weights @ value).unflatten(3, (height, width)).flatten(1, 2)
