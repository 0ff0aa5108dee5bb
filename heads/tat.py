"""TAT: task-adaptive Transformer for all-in-one medical image restoration (Yang et al. 2025, MICCAI).

A Restormer whose latent and decoder blocks take depthwise kernels that a small network makes from each picture's
latent map (so that tasks need not share weights), and a loss that learns a weight per picture (so that hard tasks do
not drown the others). Authors' code: Yaziwel/TAT (no licence stated), whose keys are ours. Differs: any batch (theirs
takes one picture at a time outside 128x128) and any size; `in_chans`; widths follow `dim` where theirs are for 48
alone; `scale`.

Attention is local: at other map sizes than the training's, windows of 1.5 times that size, overlapping where they must,
each attends alone and the mean counts (test-time local conversion, Chu et al. 2022).
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .restormer import channel_attention
from .ushaped import ChannelNorm, UShaped, require_static

# B batch, C channels, H W size of the current level, h heads

TRAIN_SIZE = 128  # the authors' crops
EXPANSION = 2.66


class LocalChannelAttention(nn.Module):
    """Channel attention in windows: the whole map where it is (128 / h)^2, else windows of (192 / h)^2.

    Args:
        dim, num_heads: C and h.
        bias: of the 1x1 convolutions (and of the depthwise one that is not adaptive).
        adaptive: the depthwise 3x3 takes kernels.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = False, adaptive: bool = False):
        super().__init__()
        self.train_size, self.window = TRAIN_SIZE // num_heads, int(1.5 * TRAIN_SIZE // num_heads)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=bias)
        if adaptive:
            self.dw_kernel = nn.Parameter(torch.randn(1, 3 * dim, 1, 3, 3))
            self.lambda_dw = nn.Parameter(torch.zeros(1, 3 * dim, 1, 1, 1))
        else:
            self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor, kernels: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and, where adaptive, kernels (B, 3C, 1, 3, 3) -> (B, C, H, W)."""
        qkv = self.qkv(x)
        if kernels is None:
            qkv = self.qkv_dwconv(qkv)
        else:
            qkv = depthwise(qkv, self.dw_kernel + self.lambda_dw * kernels)
        return self.project_out(self.attend(qkv))

    def attend(self, qkv: Tensor) -> Tensor:
        height, width = qkv.shape[-2:]
        rows, columns = starts(height, self.window), starts(width, self.window)
        if (height, width) == (self.train_size, self.train_size) or len(rows) == len(columns) == 1:
            return channel_attention(qkv, self.temperature)
        total = qkv.new_zeros(qkv.shape[0], qkv.shape[1] // 3, height, width)
        count = qkv.new_zeros(1, 1, height, width)
        for top, left in itertools.product(rows, columns):
            place = (..., slice(top, top + self.window), slice(left, left + self.window))
            total[place] += channel_attention(qkv[place], self.temperature)
            count[place] += 1
        return total / count


class GatedMLP(nn.Module):
    """Restormer's gated feed-forward network, its depthwise kernels adaptive.

    Args:
        dim: C.
        expansion: width of each half over C, rounded down.
        bias: of the 1x1 convolutions.
        adaptive: the depthwise 3x3 takes kernels.
    """

    def __init__(self, dim: int, *, expansion: float = EXPANSION, bias: bool = False, adaptive: bool = False):
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=bias)
        if adaptive:
            self.dw_kernel = nn.Parameter(torch.empty(1, 2 * hidden, 1, 3, 3))
            nn.init.kaiming_normal_(self.dw_kernel, mode='fan_out', nonlinearity='relu')
            self.lambda_dw = nn.Parameter(torch.zeros(1, 2 * hidden, 1, 1, 1))
        else:
            self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x: Tensor, kernels: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and, where adaptive, kernels (B, 2 hidden, 1, 3, 3) -> (B, C, H, W)."""
        x = self.project_in(x)
        x = self.dwconv(x) if kernels is None else depthwise(x, self.dw_kernel + self.lambda_dw * kernels)
        gate, value = x.chunk(2, 1)
        return self.project_out(F.gelu(gate) * value)


class TATBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); adaptive where kernels are given."""

    def __init__(self, dim: int, num_heads: int, *, expansion: float, bias: bool, norm: str, adaptive: bool):
        super().__init__()
        self.norm1 = ChannelNorm(dim, norm=norm)
        self.attn = LocalChannelAttention(dim, num_heads, bias=bias, adaptive=adaptive)
        self.norm2 = ChannelNorm(dim, norm=norm)
        self.ffn = GatedMLP(dim, expansion=expansion, bias=bias, adaptive=adaptive)

    def forward(self, x: Tensor, attention: Tensor | None = None, mlp: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attention)
        return x + self.ffn(self.norm2(x), mlp)


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class KernelNetwork(nn.Module):
    """Task representation: latent map (B, 8d, H, W), without gradient -> depthwise kernels of each level.

    The map is shuffled to four times its size (d/2 channels), convolved, averaged, and read by a small MLP; one linear
    layer per level and part makes the kernels.

    Args:
        dim: d.
        expansion: of the blocks' `GatedMLP`.
    """

    # level, width over d
    LEVELS = (('latent', 8), ('level3', 4), ('level2', 2), ('level1', 2))

    def __init__(self, dim: int, *, expansion: float = EXPANSION):
        super().__init__()
        self.E = nn.Sequential(
            nn.Conv2d(dim // 2, 64, 3, padding=1),
            nn.GELU(),
            _Residual(64),
            _Residual(64),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, padding=1, bias=False),
            nn.GELU(),
            nn.Conv2d(128, 256, 3, padding=1, bias=False),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.mlp = nn.Sequential(nn.Linear(256, 256, bias=False), nn.GELU(), nn.Linear(256, 256, bias=False), nn.GELU())
        for level, times in self.LEVELS:
            width = dim * times
            for part, channels in (('ffn', 2 * int(width * expansion)), ('attn', 3 * width)):
                layer = nn.Sequential(nn.Linear(256, 9 * channels, bias=False), nn.GELU())
                setattr(self, f'kernel_{level}_{part}', layer)

    def forward(self, latent: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """{level: kernels (B, channels, 1, 3, 3) of its attention and of its MLP}."""
        code = self.mlp(self.E(F.pixel_shuffle(latent.detach(), 4)).flatten(1))

        def kernels(level: str, part: str) -> Tensor:
            return getattr(self, f'kernel_{level}_{part}')(code).unflatten(1, (-1, 1, 3, 3))

        return {level: (kernels(level, 'attn'), kernels(level, 'ffn')) for level, _ in self.LEVELS}


class TAT(UShaped):
    """The whole network; `Restorer(backbone=dict(type=TAT, ...), head=dict(type=OwnRestorer, balance=True))`.

    Args:
        dim, depths, refinement, num_heads, bias, scale: see `UShaped`.
        expansion: of the blocks' `GatedMLP`.
        norm: 'with_bias' or 'bias_free'.
        in_chans, out_chans: 1 in the authors' medical pictures.
    """

    def __init__(
        self,
        *,
        dim: int = 48,
        depths: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = EXPANSION,
        bias: bool = False,
        norm: str = 'with_bias',
        in_chans: int = 1,
        out_chans: int = 1,
        scale: int = 1,
    ):
        def block(width: int, heads: int, *, adaptive: bool) -> nn.Module:
            return TATBlock(width, heads, expansion=expansion, bias=bias, norm=norm, adaptive=adaptive)

        super().__init__(
            encoder=lambda width, heads: block(width, heads, adaptive=False),
            decoder=lambda width, heads: block(width, heads, adaptive=True),
            dim=dim,
            depths=depths,
            refinement=refinement,
            num_heads=num_heads,
            bias=bias,
            in_chans=in_chans,
            out_chans=out_chans,
            scale=scale,
        )
        self.reduce_final = nn.Sequential(
            nn.Conv2d(5 * dim, dim, 3, padding=1, bias=bias), nn.GELU(), nn.Conv2d(dim, dim, 1, bias=bias)
        )
        self.output = nn.Conv2d(dim, out_chans * scale**2, 3, padding=1, bias=bias)
        self.tren = KernelNetwork(dim, expansion=expansion)

    def restore(self, images: Tensor) -> Tensor:
        require_static('TAT', images)
        _, (map1, map2, map3), latent = self.encode(images)
        kernels = self.tren(latent)
        x = self.up4_3(adapt(self.latent, latent, kernels['latent']))
        x = adapt(self.decoder_level3, self.reduce_chan_level3(torch.cat([x, map3], 1)), kernels['level3'])
        x = self.up3_2(x)
        x = adapt(self.decoder_level2, self.reduce_chan_level2(torch.cat([x, map2], 1)), kernels['level2'])
        first = adapt(self.decoder_level1, torch.cat([self.up2_1(x), map1], 1), kernels['level1'])
        x = adapt(self.refinement, first, kernels['level1'])
        return self.finish(self.output(self.reduce_final(torch.cat([map1, first, x], 1))), images)


class TaskBalance(nn.Module):
    """A weight for each picture's loss, learnt from how hard it is.

    loss = mean over pictures of L / (2 w^2) + log(1 + w^2) / 2, where w is a small MLP of three numbers without
    gradient: mean absolute differences of input and clean, input and restored, restored and clean (= L). It starts as
    w = 1. Authors' code: loss/AutomaticWeightedLoss.py, whose keys below `weight_estimator` are ours.

    Args:
        channels: hidden width of the MLP; 16 times as wide inside.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        self.weight_estimator = _Estimator(channels)

    def forward(self, degraded: Tensor, restored: Tensor, error: Tensor) -> Tensor:
        """Distances (B,) of input to clean, input to restored, restored to clean (with gradient) -> scalar."""
        weight = self.weight_estimator(torch.stack([degraded, restored, error], 1).detach()).square()
        return (0.5 * error / (weight + 1e-8) + 0.5 * torch.log(1 + weight)).mean()


class _Estimator(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc_in = nn.Linear(3, channels)
        self.res_block = _ResidualMLP(channels)
        self.fc_out = nn.Linear(channels, 1)
        nn.init.zeros_(self.fc_out.weight)
        nn.init.ones_(self.fc_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(self.res_block(self.fc_in(x))).flatten()


class _ResidualMLP(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 16 * channels)
        self.fc2 = nn.Linear(16 * channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def adapt(row: nn.Sequential, x: Tensor, kernels: tuple[Tensor, Tensor]) -> Tensor:
    """A row of adaptive blocks that share their kernels."""
    for block in row:
        x = block(x, *kernels)
    return x


def depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """(B, C, H, W) correlated with kernels of its own (B, C, 1, 3, 3), zeros outside."""
    batch, channels, height, width = x.shape
    if torch.compiler.is_exporting():  # the number of groups of a Conv in a file cannot depend on the batch
        padded = F.pad(x, (1, 1, 1, 1))
        kernels = kernels[:, :, 0]
        return sum(  # type: ignore[return-value]
            padded[..., row : row + height, column : column + width] * kernels[..., row, column, None, None]
            for row, column in itertools.product(range(3), range(3))
        )
    kernels = kernels.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    return F.conv2d(x.reshape(1, -1, height, width), kernels, padding=1, groups=batch * channels).view(x.shape)


def starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover `length`: evenly spread, the last at the end; one at 0 where it is shorter."""
    window = min(window, length)
    count = (length - 1) // window + 1
    step = window if count == 1 else math.ceil((length - window) / (count - 1) - 1e-8)
    places = [0]
    while places[-1] + window < length:
        places.append(min(places[-1] + step, length - window))
    return places
