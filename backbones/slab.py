"""Simplified linear attention as token mixers for maps, windows and stripes. SLAB: Efficient Transformers with
Simplified Linear Attention and Progressive Re-parameterized Batch Normalization, arXiv 2405.11582.

Written from the paper and the facts of the authors' code, https://github.com/xinghaochen/SLAB (no licence is stated).
Differs: theirs take one image size; here windows are padded as in their dense Swin, and position encodings of whole
maps are resampled bilinearly; linear attention is float32 in all of them (theirs in Swin alone). The models are in
`slab_models`, the norms in `layers.rep_norm`.
"""

# B batch, C channels, H W size of the current stage, h heads, d head width, w window, N positions attended to
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import full_precision
from .cswin import CrossShapedAttention, StripeAttention
from .layers import mixer, norm_factory
from .layers.fold_norm import fold_into_previous
from .layers.grid import ceil_div, to_first
from .layers.linear import Linear
from .layers.norm import NormFactory
from .layers.resize import same_size
from .pvt_v2 import resolve_heads

Grid = tuple[int, int]
_GRID = (14, 14)  # where nobody says for which map a position encoding is made


def linear_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    """out[i] = sum over j of (Q[i] . K[j]) v[j] / (sum over j of Q[i] . K[j] + eps), Q = max(q, 0), K = max(k, 0).

    The sums over j come first where that is less work. float32 at least, whatever autocast says.

    Args:
        query: (B, N, C).
        key, value: (B, M, C).
        heads: divides C.

    Returns:
        (B, N, C).
    """
    B, N, C = query.shape
    M, d = key.shape[1], C // heads
    with full_precision(query):
        q, k, v = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (query, key, value))
        q, k = (t.relu().unflatten(-1, (heads, d)).transpose(1, 2) for t in (q, k))  # (B, h, N, d)
        v = v.unflatten(-1, (heads, d)).transpose(1, 2)
        if isinstance(N, int) and isinstance(M, int) and d * (N + M) > N * M:
            products = q @ k.transpose(-1, -2)
            out = (products @ v) / (products.sum(-1, keepdim=True) + eps)
        else:
            out = (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2).unsqueeze(-1) + eps)
        return out.transpose(1, 2).reshape(B, N, C).to(value.dtype)


class HeadwiseConv(nn.Conv2d):
    """A depthwise convolution of (B, H, W, C) whose d filters are those of every head."""

    def __init__(self, head_dim: int, kernel: int):
        super().__init__(head_dim, head_dim, kernel, padding=kernel // 2, groups=head_dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.shape[-1] // self.in_channels
        weight, bias = self.weight.repeat(heads, 1, 1, 1), None if self.bias is None else self.bias.repeat(heads)
        out = F.conv2d(to_first(x), weight, bias, padding=self.padding, groups=x.shape[-1])
        return out.permute(0, 2, 3, 1)


def resampled(table: Tensor, grid: Grid, height: int, width: int) -> Tensor:
    """(1, H * W, C), made for `grid`, as (1, height * width, C)."""
    if same_size((height, width), grid):
        return table
    maps = table.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(maps, (height, width), mode='bilinear').flatten(2).transpose(1, 2)


def cropped(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left of (B, H, W, C). Cloned: asking whether it is contiguous would fix sizes of exported programs."""
    return x[:, :height, :width].clone(memory_format=torch.contiguous_format)


@mixer('sla')
class SimplifiedLinearAttention(nn.Module):
    """Linear attention without softmax: ReLU of queries and of keys with a position encoding, and a depthwise
    convolution of the values.

    Padding, where windows do not divide the map, consists of zeros before `qkv`, so its keys and values are the bias;
    they are attended to. In shifted windows, parts that were not neighbours attend to each other.

    Args:
        dim: channels.
        num_heads: divides dim; about dim // 32 if None.
        window_size: side of the windows; None attends to the whole map.
        shift: rows and columns that windows are shifted by.
        always_shift: shift on maps of one window too (in height or in width).
        kernel: side of the depthwise convolution.
        qkv_bias: learn a bias of queries, keys and values.
        grid: (H, W) of the map that the position encoding is made for, if it is the whole map's.
    """

    first_linears: ClassVar[tuple[str, ...]] = ('qkv',)
    last_linear: ClassVar[str] = 'proj'
    outside: Tensor | None

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        window_size: int | None = None,
        shift: int = 0,
        always_shift: bool = True,
        kernel: int = 5,
        qkv_bias: bool = True,
        grid: Grid | None = None,
    ):
        super().__init__()
        if window_size is None:
            shift = 0
        elif not 0 <= shift < window_size:
            raise ValueError(f'shift must be from 0 to window_size - 1, got {shift=}, {window_size=}')
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f'kernel must be a positive odd number, got {kernel=}')
        self.num_heads = resolve_heads(dim, num_heads)
        self.window_size, self.shift, self.always_shift = window_size, shift, always_shift
        self.grid = (window_size, window_size) if window_size is not None else grid or _GRID
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.dwc = HeadwiseConv(dim // self.num_heads, kernel)
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.register_buffer('outside', None)  # q, k and v of padding, where they are not the bias: see fold_into_next

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        side, qkv = self.window_size, self.qkv(x)
        if side is None or (isinstance(H, int) and isinstance(W, int) and H == W == side and not self.shift):
            return self.proj(self.attend(qkv))
        shift = 0 if not self.always_shift and min(H, W) <= side else self.shift
        rows, cols = ceil_div(H, side), ceil_div(W, side)
        bottom, right = rows * side - H, cols * side - W
        fits = isinstance(bottom, int) and isinstance(right, int) and bottom == 0 and right == 0
        if not fits:
            outside = self.qkv.bias if self.outside is None else self.outside
            padding = (0, 0, 0, right, 0, bottom)
            qkv = F.pad(qkv, padding) if outside is None else F.pad(qkv - outside, padding) + outside
        if shift:
            qkv = qkv.roll((-shift, -shift), (1, 2))
        windows = qkv.unflatten(2, (cols, side)).unflatten(1, (rows, side)).transpose(2, 3)
        out = self.attend(windows.flatten(0, 2)).unflatten(0, (-1, rows, cols))
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return self.proj(out if fits else cropped(out, H, W))

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Resizes a checkpoint's position encoding of another whole map, which must be square."""
        table = state.get(prefix + 'positional_encoding')
        if self.window_size is not None or not isinstance(table, Tensor) or table.ndim != 3:
            return
        side = math.isqrt(table.shape[1])
        if side * side == table.shape[1] and table.shape[1:] != self.positional_encoding.shape[1:]:
            state[prefix + 'positional_encoding'] = resampled(table, (side, side), *self.grid)

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C), channels ordered (q | k | v), to (B, H, W, C): all positions attend to each other."""
        B, H, W, _ = qkv.shape
        query, key, value = qkv.chunk(3, -1)
        key = key.flatten(1, 2) + resampled(self.positional_encoding, self.grid, H, W)
        out = linear_attention(query.flatten(1, 2), key, value.flatten(1, 2), self.num_heads)
        return out.view(B, H, W, -1) + self.dwc(value)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}'


@mixer('reduced_sla')
class ReducedLinearAttention(nn.Module):
    """Simplified linear attention to a smaller map, which a strided convolution makes.

    The values that the depthwise convolution reads are stretched back along the row order of positions, not in the
    map, as the authors' are.

    Args:
        dim: channels.
        num_heads: divides dim; about dim // 32 if None.
        sr_ratio: side of the blocks of positions that become one.
        norm: normalisation of the smaller map, by name or what makes it.
        kernel: side of the depthwise convolution.
        grid: (H, W) of the map that the position encoding is made for.
    """

    last_linear: ClassVar[str] = 'proj'

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        sr_ratio: int = 1,
        norm: str | NormFactory = 'layer',
        kernel: int = 5,
        grid: Grid | None = None,
    ):
        super().__init__()
        if sr_ratio < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f'sr_ratio must be positive and kernel odd, got {sr_ratio=}, {kernel=}')
        self.num_heads, self.sr_ratio = resolve_heads(dim, num_heads), sr_ratio
        height, width = grid or _GRID
        self.grid = ceil_div(height, sr_ratio), ceil_div(width, sr_ratio)
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = norm_factory(norm)(dim) if isinstance(norm, str) else norm(dim)
        self.dwc = HeadwiseConv(dim // self.num_heads, kernel)
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))

    @property
    def first_linears(self) -> tuple[str, ...]:
        """The layers that read the input."""
        return ('q', 'kv') if self.sr_ratio == 1 else ()

    def for_deploy(self) -> nn.Module:
        """The same in evaluation mode, with a norm that is affine inside the convolution before it."""
        if self.sr_ratio > 1:
            self.norm = fold_into_previous(self.sr, self.norm)
        return self

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        small = x
        if self.sr_ratio > 1:
            height, width = ceil_div(H, self.sr_ratio) * self.sr_ratio, ceil_div(W, self.sr_ratio) * self.sr_ratio
            padded = F.pad(to_first(x), (0, width - W, 0, height - H))
            small = self.norm(self.sr(padded).permute(0, 2, 3, 1))
        key, value = self.kv(small).chunk(2, -1)
        key = key.flatten(1, 2) + resampled(self.positional_encoding, self.grid, small.shape[1], small.shape[2])
        out = linear_attention(self.q(x).flatten(1, 2), key, value.flatten(1, 2), self.num_heads)
        if self.sr_ratio > 1:
            value = F.interpolate(value.flatten(1, 2).transpose(1, 2), H * W, mode='linear').transpose(1, 2)
        return self.proj(out.view(B, H, W, C) + self.dwc(value.reshape(B, H, W, C)))

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, sr_ratio={self.sr_ratio}'


class StripedLinearAttention(nn.Module):
    """Simplified linear attention within stripes, plus CSWin's convolution of the values that ends at their borders.

    Args:
        dim: channels.
        num_heads: attention heads.
        height, width: of the stripes; None spans the map. Maps that stripes do not divide are padded below and to the
            right with positions whose q, k and v are 0.
        grid: (H, W) of the map that the position encoding is made for.
        kernel: side of the depthwise convolution whose filters heads share.
    """

    def __init__(self, dim: int, num_heads: int, *, height: int | None, width: int | None, grid: Grid, kernel: int = 5):
        super().__init__()
        self.num_heads, self.height, self.width = num_heads, height, width
        self.grid = height or grid[0], width or grid[1]
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.dwc = HeadwiseConv(dim // num_heads, kernel)
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        # in the published weights, and never used
        self.scale = nn.Parameter(torch.zeros(1, 1, dim), requires_grad=False)

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, H, W, 3C), channels ordered (q | k | v), to (B, H, W, C)."""
        _, H, W, _ = qkv.shape
        if self.height is None and self.width is None:
            return self.attend(qkv)
        wh, ww = self.height or H, self.width or W
        rows, cols = ceil_div(H, wh), ceil_div(W, ww)
        qkv = F.pad(qkv, (0, 0, 0, cols * ww - W, 0, rows * wh - H))
        stripes = qkv.unflatten(2, (cols, ww)).unflatten(1, (rows, wh)).transpose(2, 3)
        out = self.attend(stripes.flatten(0, 2)).unflatten(0, (-1, rows, cols))
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return cropped(out, H, W)

    def attend(self, qkv: Tensor) -> Tensor:
        """One stripe: all positions attend to each other."""
        B, H, W, _ = qkv.shape
        query, key, value = qkv.chunk(3, -1)
        key = key.flatten(1, 2) + resampled(self.positional_encoding, self.grid, H, W)
        out = linear_attention(query.flatten(1, 2), key, value.flatten(1, 2), self.num_heads)
        return out.view(B, H, W, -1) + self.dwc(value) + self.get_v(to_first(value)).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, height={self.height}, width={self.width}'


@mixer('linear_stripe')
class CrossShapedLinearAttention(CrossShapedAttention):
    """CSWin's mixer with simplified linear attention in its stripes; arguments as there.

    Args:
        grid: (H, W) of the map that the position encodings are made for.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        split_size: int | None = None,
        bias: bool = True,
        grid: Grid | None = None,
    ):
        super().__init__(dim=dim, num_heads=num_heads, split_size=split_size, bias=bias)
        stripes = [old for old in self.attns if isinstance(old, StripeAttention)]
        self.attns = nn.ModuleList(
            StripedLinearAttention(
                old.get_v.in_channels, old.num_heads, height=old.height, width=old.width, grid=grid or _GRID
            )
            for old in stripes
        )
