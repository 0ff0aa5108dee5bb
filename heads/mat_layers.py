"""Layers of MAT: weights of unit variance scaled at run time (StyleGAN2), partial convolutions, mask-aware attention.

Karras et al. 2020, arXiv 1912.04958; Liu et al. 2018, arXiv 1804.07723 (partial convolution); Li et al. 2022, arXiv
2203.15270 (MAT). Authors' code: fenglinglwb/MAT (CC BY-NC 4.0), whose keys are ours, the constant `resample_filter`
included. A mask is 1 where a picture is known, 0 in its holes, never anything between.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, C channels, H W size of the current level, h heads, w window, T = w * w tokens of a window

FILTER = (1.0, 3.0, 3.0, 1.0)


def smoothing_filter() -> Tensor:
    """(4, 4), sum 1: the low-pass filter before a step down and after a step up."""
    taps = torch.tensor(FILTER)
    return torch.outer(taps, taps) / taps.sum() ** 2


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 times sqrt(2), which keeps the variance."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def smooth(x: Tensor, kernel: Tensor, padding: int, gain: float = 1.0) -> Tensor:
    """Each channel of (B, C, H, W) correlated with one kernel (k, k)."""
    channels = x.shape[1]
    return F.conv2d(x, (gain * kernel).to(x.dtype).expand(channels, 1, -1, -1), padding=padding, groups=channels)


def resampled_conv(x: Tensor, weight: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1) -> Tensor:
    """A convolution of odd size that keeps (B, C, H, W), halves it (even sizes) or doubles it, with smoothing.

    Args:
        weight: (O, C, k, k).
        kernel: the filter, (4, 4).
    """
    if down == 2:
        return F.conv2d(smooth(x, kernel, weight.shape[-1] // 2 + 1), weight, stride=2)
    if up == 2:
        # transposed: one scattered copy of the correlation kernel per pixel, two pixels apart
        spread = F.conv_transpose2d(x, weight.flip(-2, -1).transpose(0, 1), stride=2)
        return smooth(spread, kernel, 2 - weight.shape[-1] // 2, gain=4.0)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class ScaledLinear(nn.Module):
    """(..., in) -> (..., out); weights of unit variance are multiplied by rate / sqrt(in).

    Args:
        leak: leaky ReLU after it.
        rate: factor of the learning rate: of weight and bias at run time.
        bias: initial bias.
    """

    def __init__(self, inputs: int, outputs: int, *, leak: bool = False, rate: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.leak, self.gain, self.rate = leak, rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.gain, self.bias * self.rate)
        return leaky(x) if self.leak else x


class ScaledConv(nn.Module):
    """(B, C, H, W) -> (B, O, up H / down, up W / down), with the weights' scale at run time and a leaky ReLU."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, up: int = 1, down: int = 1, leak: bool = True):
        super().__init__()
        self.up, self.down, self.leak = up, down, leak
        self.register_buffer('resample_filter', smoothing_filter())
        self.gain = 1 / math.sqrt(inputs * size**2)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = resampled_conv(x, self.weight * self.gain, self.resample_filter, up=self.up, down=self.down)
        x = x + self.bias[:, None, None]
        return leaky(x) if self.leak else x


class PartialConv(nn.Module):
    """`ScaledConv` whose result is divided by the known share under each kernel; zero where nothing is known.

    The convolution sees the map as it is, holes included; what comes out of a place that sees a known pixel is known.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, up: int = 1, down: int = 1, leak: bool = True):
        super().__init__()
        self.conv = ScaledConv(inputs, outputs, size, up=up, down=down, leak=leak)
        self.size, self.down = size, down

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map (B, C, H, W) and mask (B, 1, H, W) or None (all known) -> both after the layer."""
        x = self.conv(x)
        if mask is None:
            return x, None
        window = mask.new_ones(1, 1, self.size, self.size)
        count = F.conv2d(mask, window, stride=self.down, padding=self.size // 2)
        known = count.clamp(0, 1)
        # Counts are whole: one at least, rather than the authors' + 1e-8, which half precision rounds away.
        return x * (self.size**2 / count.clamp(min=1) * known), known


class MaskedWindowAttention(nn.Module):
    """Attention in a window to its known tokens: queries and keys of unit length go in, values as they are.

    Keys in a hole get -100, so a window without any known token still attends to all of it. A window with a known
    token is known everywhere afterwards.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'num_heads must divide dim={dim}, got {num_heads}')
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.q, self.k, self.v = ScaledLinear(dim, dim), ScaledLinear(dim, dim), ScaledLinear(dim, dim)
        self.proj = ScaledLinear(dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Windows (B, n, T, C), mask (B, n, T, 1) or None, and (n, T, T), 0 or -100 between tokens -> x and mask."""
        unit = F.normalize(x, dim=-1)
        query, key, value = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
            for layer, tokens in ((self.q, unit), (self.k, unit), (self.v, x))
        )
        scores = query @ key.transpose(-2, -1) * self.scale  # (B, n, h, T, T)
        if apart is not None:
            scores = scores + apart[:, None]
        if mask is not None:
            scores = scores - 100.0 * (1 - mask)[:, :, None].transpose(-2, -1)
            mask = mask.sum(2, keepdim=True).clamp(0, 1).expand_as(mask)
        out = (scores.softmax(-1) @ value).transpose(2, 3).flatten(3)
        return self.proj(out), mask


class ScaledMLP(nn.Module):
    """Two linear layers, a leaky ReLU between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = ScaledLinear(dim, hidden, leak=True)
        self.fc2 = ScaledLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class MATBlock(nn.Module):
    """mlp(fuse([x, attention(x)])): neither norms nor a sum, which would carry the holes' values along.

    Args:
        dim, num_heads: C and h.
        window: w; its windows cover H and W exactly.
        shift: of the windows to the left and up, in tokens.
        ratio: width of the MLP over C.
    """

    def __init__(self, dim: int, num_heads: int, *, window: int, shift: int = 0, ratio: float = 2.0):
        super().__init__()
        self.window, self.shift = window, shift
        self.attn = MaskedWindowAttention(dim, num_heads)
        self.fuse = ScaledLinear(2 * dim, dim, leak=True)
        self.mlp = ScaledMLP(dim, int(dim * ratio))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) and (B, H, W, 1) or None -> the same."""
        height, width = x.shape[1:3]
        if height % self.window or width % self.window:
            raise ValueError(f'the map must hold whole windows of {self.window}, got {height}x{width}')
        apart = between(height, width, self.window, self.shift, x) if self.shift else None
        attended, mask = self.attn(self._cut(x), None if mask is None else self._cut(mask), apart)
        x = self.fuse(torch.cat([x, self._join(attended, height, width)], -1))
        return self.mlp(x), None if mask is None else self._join(mask, height, width)

    def _cut(self, x: Tensor) -> Tensor:
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        return windows(x, self.window)

    def _join(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x.unflatten(1, (height // self.window, width // self.window))
        x = x.unflatten(3, (self.window, self.window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class Step(nn.Module):
    """A partial convolution that halves or doubles the map (key `conv`)."""

    def __init__(self, dim: int, *, up: int = 1, down: int = 1):
        super().__init__()
        self.conv = PartialConv(dim, dim, up=up, down=down)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.conv(x, mask)


class MATLayer(nn.Module):
    """A stage: a step down or up, blocks, and a partial convolution that is added to what entered them.

    Args:
        dim, num_heads, window, ratio: see `MATBlock`; every second block is shifted by half a window.
        size: side of the map that the stage is made for: where one window covers it, no block is shifted.
        up, down: 2 for a step before the blocks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        depth: int,
        window: int,
        size: int,
        up: int = 1,
        down: int = 1,
        ratio: float = 2.0,
    ):
        super().__init__()
        self.downsample = Step(dim, up=up, down=down) if (up, down) != (1, 1) else None
        single = size <= window
        self.blocks = nn.ModuleList(
            MATBlock(dim, num_heads, window=min(window, size), ratio=ratio,
                     shift=0 if single or number % 2 == 0 else window // 2)
            for number in range(depth)
        )  # fmt: skip
        self.conv = PartialConv(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) and (B, 1, H, W) or None -> both after the step, of its size."""
        if self.downsample is not None:
            x, mask = self.downsample(x, mask)
        tokens, known = x.permute(0, 2, 3, 1), None if mask is None else mask.permute(0, 2, 3, 1)
        for block in self.blocks:
            tokens, known = block(tokens, known)
        out, mask = self.conv(tokens.permute(0, 3, 1, 2), None if known is None else known.permute(0, 3, 1, 2))
        return out + x, mask


def windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, n, w * w, C), row by row."""
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def between(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(n, T, T): -100 between tokens of a shifted window that were not neighbours before the roll, 0 elsewhere."""

    def part(length: int) -> Tensor:
        place = torch.arange(length, device=like.device)
        return (place >= length - window).long() + (place >= length - shift)

    region = 3 * part(height)[:, None] + part(width)
    region = windows(region[None, ..., None], window)[0, :, :, 0]
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0).to(like.dtype)
