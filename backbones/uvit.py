"""UViT: A Simple Single-Scale Vision Transformer for Object Detection and Instance Segmentation, arXiv 2112.09747.

Written from the paper; the authors announced code and published none. From the paper: 18 blocks of constant width
(222, 288, 384) with 6 heads and MLPs of ratio 4; patches of 16 pixels in the classifier and of 8 in the dense form,
whose convolution and positions are interpolated from it; attention windows in the dense form whose sides are a quarter,
a half and the whole of the map's, in 14, 2 and 2 blocks (UViT+; UViT takes halves, `window_parts=(2,) * 18`).

Our reading, where the paper is silent: the mean of the tokens instead of a class token, which windows would not meet;
global attention in the classifier, as the published 2.5, 4.0 and 6.9 billion operations say; bicubic interpolation, of
the convolution with the sum over a patch kept; LayerNorm of 1e-6; windows rounded up where they do not divide the map.
The paper gives the one map of stride 8 to its heads; the simple feature pyramid over it is ours.
"""

# B batch, N tokens, C channels, H W size of the grid, h heads, d head width, n windows along each side
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvDownsample, Mlp, TokenAttention, TokenBlock, drop_path_schedule, norm_factory
from .layers.grid import ceil_div, grid_of
from .layers.positions import PositionTable
from .layers.resize import resize_table
from .layers.token_attention import split_heads
from .plain import Plain, check_plain
from .registry import register, weights


class PartAttention(TokenAttention):
    """Self-attention within n x n windows, which grow with the map; (B, H W, C) -> (B, H W, C).

    Windows have ceil(H / n) x ceil(W / n) positions; those beyond the map are not attended to.

    Args:
        parts: n; 1 attends to all tokens.
        The others: see `TokenAttention`.
    """

    def __init__(self, *, dim: int, num_heads: int, parts: int = 1):
        super().__init__(dim=dim, num_heads=num_heads)
        if parts < 1:
            raise ValueError(f'parts must be positive, got {parts=}')
        self.parts = parts

    @property
    def any_tokens(self) -> bool:
        return self.parts == 1

    def forward(
        self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None, outputs: int | None = None
    ) -> Tensor:
        """`bias` and `outputs` as in `TokenAttention`, for parts=1 alone."""
        if self.parts == 1:
            return super().forward(x, grid, bias, outputs)
        if bias is not None or outputs is not None:
            raise ValueError('windows take no bias and give all tokens: merged tokens lie on no grid')
        n, (height, width) = self.parts, grid
        high, wide = ceil_div(height, n), ceil_div(width, n)
        qkv = F.pad(self.qkv(x).unflatten(1, grid), (0, 0, 0, n * wide - width, 0, n * high - height))
        qkv = qkv.unflatten(2, (n, wide)).unflatten(1, (n, high))  # (B, n, high, n, wide, 3C)
        qkv = qkv.transpose(2, 3).reshape(x.shape[0] * n * n, high * wide, -1)
        query, key, value = split_heads(qkv, self.num_heads, 3)
        out = self._attend(query, key, value, self._outside(grid, (high, wide), x)).transpose(1, 2)
        out = out.reshape(x.shape[0], n, n, high, wide, -1).transpose(2, 3)
        out = out.reshape(x.shape[0], n * high, n * wide, -1)[:, :height, :width]
        # a copy always: whether one is needed depends on sizes, which may be symbolic
        return self.proj(out.clone(memory_format=torch.contiguous_format).flatten(1, 2))

    def _outside(self, grid: tuple[int, int], window: tuple[int, int], x: Tensor) -> Tensor | None:
        """(B n n, 1, 1, positions): -inf at positions beyond the map, in windows that have others; None without any."""
        n = self.parts
        if all(isinstance(size, int) and size == n * side for size, side in zip(grid, window)):
            return None  # symbolic sizes always take the mask: one graph for every size
        rows, cols = (torch.arange(n * side, device=x.device) < size for size, side in zip(grid, window))
        inside = (rows[:, None] & cols).unflatten(1, (n, window[1])).unflatten(0, (n, window[0]))
        inside = inside.transpose(1, 2).reshape(n * n, window[0] * window[1])
        seen = inside | ~inside.any(1, keepdim=True)
        bias = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, float('-inf'))
        return bias.repeat(x.shape[0], 1)[:, None, None]

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, parts={self.parts}'


class UViT(Plain):
    """A vision transformer of constant width and resolution, with windows that grow from block to block.

    Args:
        depth, dim: blocks and channels.
        num_heads: attention heads.
        patch_size: pixels of a patch's side, and their stride.
        mlp_ratio: width of the MLPs over dim.
        norm: normalisation throughout, by name.
        window_parts: for each block, the number of windows along each side of the map; None attends to all tokens.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: height and width that positions are made for, 224 if None.
        The others: see `Plain.assemble`.
    """

    has_golden = False
    min_dynamic_size = 65  # from there on windows of a quarter of the map have more than one position of 16 pixels
    reduced: ClassVar[dict[str, Any]] = {
        'depth': 4,
        'dim': 32,
        'num_heads': 2,
        'patch_size': 16,  # in dense form too, so that its weights are the classifier's
        'window_parts': (4, 4, 2, 1),
    }

    def __init__(
        self,
        *,
        depth: int = 18,
        dim: int = 384,
        num_heads: int = 6,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        norm: str = 'layer',
        window_parts: Sequence[int] | None = None,
        pyramid_dim: int | None = None,
        pyramid_blocks: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        check_plain(depth=depth, dim=dim, patch_size=patch_size)
        parts = (1,) * depth if window_parts is None else tuple(window_parts)
        if len(parts) != depth:
            raise ValueError(f'window_parts must be {depth} numbers, one per block, got {len(parts)}')
        make_norm = norm_factory(norm)
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=ConvDownsample(in_chans, dim, kernel=patch_size, stride=patch_size, padding=0, image=True),
            position=PositionTable(dim, grid_of(img_size, patch_size), method='bicubic'),
            prefix=(),
            blocks=[
                TokenBlock(
                    dim=dim,
                    norm=make_norm,
                    attn=PartAttention(dim=dim, num_heads=num_heads, parts=n),
                    mlp=Mlp(dim=dim, ratio=mlp_ratio),
                    drop_path=rate,
                )
                for n, rate in zip(parts, drop_path_schedule([depth], drop_path_rate)[0])
            ],
            norm=make_norm,
            pooling='avg',
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def resample(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for this image size and these patches."""
        kernel = state.get('patch_embed.conv.weight')
        own: nn.Conv2d = self.patch_embed.conv  # type: ignore[assignment,union-attr]
        if isinstance(kernel, Tensor) and kernel.ndim == 4 and kernel.shape[2:] != own.weight.shape[2:]:
            side = kernel.shape[2:]
            table = kernel.flatten(0, 1).permute(1, 2, 0)
            resized = resize_table(table, own.weight.shape[2:], 'bicubic_antialias')  # type: ignore[arg-type]
            # sums over a patch of the same picture stay as large
            resized = resized * (side[0] * side[1] / (resized.shape[0] * resized.shape[1]))
            state['patch_embed.conv.weight'] = resized.permute(2, 0, 1).unflatten(0, kernel.shape[:2])
        return super().resample(state)


# The paper's table counts 13.5, 21.7 and 32.8 million parameters. The first two are exactly those of patches of 8
# pixels and positions for 896 x 896 without a classifier, of which the base model has 36.8; here the classifier's.
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2112.09747',
    'origin': 'https://arxiv.org/abs/2112.09747',
    'licence': 'no weights were published',
    'first_conv': 'patch_embed.conv',
}
_DENSE: dict[str, Any] = {'patch_size': 8, 'window_parts': (4,) * 14 + (2,) * 2 + (1,) * 2}

register(
    'uvit_tiny',
    UViT,
    dim=222,
    dense=_DENSE,
    weights=[weights('in1k', None, top1=76.0, params=11.1, macs=2.5, **_PAPER)],
)
register(
    'uvit_small',
    UViT,
    dim=288,
    dense=_DENSE,
    weights=[weights('in1k', None, top1=78.9, params=18.5, macs=4.0, **_PAPER)],
)
register(
    'uvit_base',
    UViT,
    dim=384,
    dense=_DENSE,
    weights=[weights('in1k', None, top1=81.3, params=32.7, macs=6.9, **_PAPER)],
)
