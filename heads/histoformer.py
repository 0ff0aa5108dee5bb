"""Histoformer: Sun et al. 2024, arXiv 2407.10172: attention between pixels of like intensity, for all weathers.

Rain, snow and haze change pixels in a like way wherever they are: pixels are sorted by intensity and attention works on
bins of the sorted row. Authors' code: sunshangquan/Histoformer (no licence stated), whose keys are ours; dim 36, depths
(4, 4, 6, 8), expansion 2.667 for its all-weather weights. Differs: sizes that 8 does not divide are mirrored inside;
`scale`; the small pictures have the picture's channels where theirs always have three. The block serves any backbone
through `UNetRestorer(block='histoformer')`.

Sorting makes float32 results unstable where two pixels are nearly equal: they may swap places between two machines.
Compilers for TensorRT refuse sorts of more than 3840 values, so engines take tiles of at most so many pixels (48x80).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ushaped import ChannelNorm, UShaped

# B batch, C channels, H W size of the current level, h heads and bins, c = C / h, n = H W / h


class HistogramAttention(nn.Module):
    """Dynamic-range convolution, then histogram self-attention in two foldings, multiplied.

    The first half of the channels is sorted along H, then along W, before the convolutions that make q1, k1, q2, k2, v
    (so that a 3x3 window sees like values), and put back at the end. Values are sorted over all pixels, channel by
    channel; queries and keys follow. With the sorted row cut into h parts of n, tokens are (channel, part) and
    features the places in a part (bins of like intensity); with it dealt out to h parts in turn, each part runs
    through all intensities. Weights are exp(a) / (1 + sum exp(a)): all may be small.

    Args:
        dim, num_heads: C and h.
        bias: convolutions have one.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 5 * dim, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(5 * dim, 5 * dim, 3, padding=1, groups=5 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        channels, height, width = x.shape[1:]
        half = channels // 2
        ordered, down = x[:, :half].sort(-2)
        ordered, across = ordered.sort(-1)
        qkv = self.qkv_dwconv(self.qkv(torch.cat([ordered, x[:, half:]], 1)))
        *others, value = qkv.flatten(2).chunk(5, 1)
        value, order = value.sort(-1)
        query1, key1, query2, key2 = (other.gather(-1, order) for other in others)
        bins = self.attend(query1, key1, value, together=True)
        frequencies = self.attend(query2, key2, value, together=False)
        # the product of both in sorted order is the same as that of both in the picture's
        out = put_back(bins * frequencies, order, -1).unflatten(-1, (height, width))
        out = self.project_out(out)
        restored = put_back(put_back(out[:, :half], across, -1), down, -2)
        return torch.cat([restored, out[:, half:]], 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, together: bool) -> Tensor:
        """(B, C, H W) sorted -> the same; `together`: neighbours of the sorted row share a part."""
        heads, length = self.num_heads, query.shape[-1]
        full = (length + heads - 1) // heads * heads
        query, key, value = (self.fold(F.pad(x, (0, full - length)), together) for x in (query, key, value))
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        weights = (query @ key.transpose(-2, -1) * self.temperature).exp()
        out = weights @ value / (weights.sum(-1, keepdim=True) + 1)
        parts = out.unflatten(2, (-1, heads))  # (B, h, c, h, n)
        parts = parts if together else parts.transpose(-2, -1)
        return parts.flatten(3).flatten(1, 2)[..., :length]

    def fold(self, x: Tensor, together: bool) -> Tensor:
        """(B, C, h n) -> (B, h, c h, n)."""
        heads = self.num_heads
        x = x.unflatten(1, (heads, -1))
        x = x.unflatten(-1, (heads, -1)) if together else x.unflatten(-1, (-1, heads)).transpose(-2, -1)
        return x.flatten(2, 3)


class DualScaleMLP(nn.Module):
    """Dual-scale gated feed-forward network: two depthwise convolutions at twice the resolution, one gates the other.

    Args:
        dim: C.
        expansion: hidden width over C, rounded down; must come out as a multiple of 4.
        bias: convolutions have one.
    """

    def __init__(self, dim: int, *, expansion: float = 2.667, bias: bool = False):
        super().__init__()
        hidden = int(dim * expansion)
        if hidden % 4:
            raise ValueError(f'int(dim * expansion) must be a multiple of 4, got {hidden} from {dim=}, {expansion=}')
        fine = hidden // 4
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=bias)
        self.dwconv_5 = nn.Conv2d(fine, fine, 5, padding=2, groups=fine, bias=bias)
        self.dwconv_dilated2_1 = nn.Conv2d(fine, fine, 3, padding=2, groups=fine, bias=bias, dilation=2)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.pixel_shuffle(self.project_in(x), 2).chunk(2, 1)
        x = F.mish(self.dwconv_dilated2_1(gate)) * self.dwconv_5(value)
        return self.project_out(F.pixel_unshuffle(x, 2))


class HistoformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (B, C, H, W); the norms have no parameters.

    Args:
        dim, num_heads: C and h.
        expansion: of `DualScaleMLP`.
        bias: convolutions have one.
        norm: see `ChannelNorm`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, expansion: float = 2.667, bias: bool = False, norm: str = 'with_bias'
    ):
        super().__init__()
        self.attn_g = HistogramAttention(dim, num_heads, bias=bias)
        self.norm_g = ChannelNorm(dim, norm=norm, affine=False)
        self.ffn = DualScaleMLP(dim, expansion=expansion, bias=bias)
        self.norm_ff1 = ChannelNorm(dim, norm=norm, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_g(self.norm_g(x))
        return x + self.ffn(self.norm_ff1(x))


class PictureEmbed(nn.Module):
    """The picture at half its size: mean of 2x2, 1x1 convolution, depthwise 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Histoformer(UShaped):
    """The whole network; `Restorer(backbone=dict(type=Histoformer, ...), head=dict(type=OwnRestorer, pearson=1.0))`.

    The small picture itself is concatenated wherever the encoder goes down.

    Args:
        dim, depths, refinement, num_heads, bias, in_chans, out_chans, scale: see `UShaped`.
        expansion: of the blocks' `DualScaleMLP`; the authors' default for other tasks is 2.66.
        norm: 'with_bias' or 'bias_free'.
    """

    reduced = {**UShaped.reduced, 'expansion': 2.0}

    def __init__(
        self,
        *,
        dim: int = 36,
        depths: Sequence[int] = (4, 4, 6, 8),
        refinement: int = 4,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.667,
        bias: bool = False,
        norm: str = 'with_bias',
        in_chans: int = 3,
        out_chans: int = 3,
        scale: int = 1,
    ):
        def block(width: int, heads: int) -> nn.Module:
            return HistoformerBlock(width, heads, expansion=expansion, bias=bias, norm=norm)

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
        self.skip_patch_embed1 = PictureEmbed(in_chans)
        self.skip_patch_embed2 = PictureEmbed(in_chans)
        self.skip_patch_embed3 = PictureEmbed(in_chans)
        self.reduce_chan_level_1 = nn.Conv2d(2 * dim + in_chans, 2 * dim, 1, bias=bias)
        self.reduce_chan_level_2 = nn.Conv2d(4 * dim + in_chans, 4 * dim, 1, bias=bias)
        self.reduce_chan_level_3 = nn.Conv2d(8 * dim + in_chans, 8 * dim, 1, bias=bias)

    def entering(self, level: int, x: Tensor, images: Tensor) -> Tensor:
        small = self.skip_patch_embed1(images)
        if level > 2:
            small = self.skip_patch_embed2(small)
        if level > 3:
            small = self.skip_patch_embed3(small)
        reduce = (self.reduce_chan_level_1, self.reduce_chan_level_2, self.reduce_chan_level_3)[level - 2]
        return reduce(torch.cat([x, small], 1))


def put_back(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Undoes a sort: out[order[i]] = x[i] along `dim`."""
    return torch.scatter(x, dim, order, x)
