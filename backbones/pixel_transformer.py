"""The pixel transformer: An Image is Worth More Than 16x16 Patches, arXiv 2406.09415.

Written from the paper, whose authors published no code: a plain vision transformer whose patches are single pixels,
with learned positions that know nothing of the grid, trained on images of 28 x 28 pixels (ImageNet) and of 32 x 32
(CIFAR-100: `img_size=32, num_classes=100`). Our reading: widths and heads are the vision transformer's, and the mean of
the pixels stands for a class token, which windows would not meet. Accuracies are left out, as they could not be checked
against the paper.

The dense form is ours: a pyramid by max pooling over a map of stride 1, from attention within windows of 28 x 28
pixels, since that between all pixels takes time and memory that grow with the square of H W.
"""

# B batch, N tokens, C channels, H W size of the image
from collections.abc import Sequence
from typing import Any, ClassVar

from .layers import ConvDownsample, Mlp, TokenAttention, TokenBlock, drop_path_schedule, norm_factory
from .layers.grid import grid_of
from .layers.positions import PositionTable
from .plain import Plain, block_windows, check_plain
from .registry import register, weights


class PixelTransformer(Plain):
    """A vision transformer whose tokens are pixels.

    Args:
        depth, dim: blocks and channels.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs over dim.
        window_size: side of the windows that pixels attend within; None for none.
        global_blocks: blocks without windows, four evenly spaced ones if None.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: height and width that positions are made for, 28 if None.
        The others: see `Plain.assemble`.
    """

    has_golden = False
    reduced: ClassVar[dict[str, Any]] = {
        'depth': 3,
        'dim': 16,
        'num_heads': 1,
        'window_size': 8,
        'global_blocks': (),
    }

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 384,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        norm: str = 'layer',
        window_size: int | None = None,
        global_blocks: Sequence[int] | None = None,
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
        check_plain(depth=depth, dim=dim, patch_size=1)
        make_norm = norm_factory(norm)
        self.assemble(
            dim=dim,
            stride=1,
            patch_embed=ConvDownsample(in_chans, dim, kernel=1, stride=1, padding=0, image=True),
            position=PositionTable(dim, grid_of(img_size, 1, 28), method='bicubic'),
            prefix=(),
            blocks=[
                TokenBlock(
                    dim=dim,
                    norm=make_norm,
                    attn=TokenAttention(dim=dim, num_heads=num_heads, window_size=window),
                    mlp=Mlp(dim=dim, ratio=mlp_ratio),
                    drop_path=rate,
                )
                for window, rate in zip(
                    block_windows(depth, window_size, global_blocks), drop_path_schedule([depth], drop_path_rate)[0]
                )
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


_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2406.09415',
    'origin': 'https://arxiv.org/abs/2406.09415',
    'licence': 'no weights were published',
    'first_conv': 'patch_embed.conv',
}
_DENSE: dict[str, Any] = {'window_size': 28, 'global_blocks': ()}

# parameters are counted
register(
    'pixel_tiny_28',
    PixelTransformer,
    dim=192,
    num_heads=3,
    dense=_DENSE,
    weights=[weights('in1k', None, top1=None, params=5.7, macs=None, size=28, **_PAPER)],
)
register(
    'pixel_small_28',
    PixelTransformer,
    dim=384,
    num_heads=6,
    dense=_DENSE,
    weights=[weights('in1k', None, top1=None, params=22.0, macs=None, size=28, **_PAPER)],
)
register(
    'pixel_base_28',
    PixelTransformer,
    dim=768,
    num_heads=12,
    dense=_DENSE,
    weights=[weights('in1k', None, top1=None, params=86.4, macs=None, size=28, **_PAPER)],
)
