"""Tokenizers of plain backbones: (B, C, H, W) -> (B, ceil(H / stride), ceil(W / stride), dim), images to patches."""

from torch import Tensor, nn

from .downsample import ConvDownsample
from .grid import pad_bottom_right, to_last
from .lookup import choose


class HMlpStem(nn.Module):
    """Patches of 16 pixels by convolutions that never look beyond a patch; (B, C, H, W) -> (B, H / 16, W / 16, dim).

    4x4, 2x2 and 2x2 convolutions without overlap, each with batch norm, GELU between: masking patches before or after
    the stem is the same. Heights and widths are rounded up.
    """

    stride = 16

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        if dim % 4:
            raise ValueError(f'the hMLP stem needs dim divisible by 4, got {dim=}')
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 4, 4, 4),
            nn.BatchNorm2d(dim // 4),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 4, 2, 2),
            nn.BatchNorm2d(dim // 4),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim, 2, 2),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return to_last(self.proj(pad_bottom_right(x, self.stride)))


def _linear(in_chans: int, dim: int, patch_size: int) -> nn.Module:
    return ConvDownsample(in_chans, dim, kernel=patch_size, stride=patch_size, padding=0, image=True)


def _hmlp(in_chans: int, dim: int, patch_size: int) -> nn.Module:
    if patch_size != HMlpStem.stride:
        raise ValueError(f"stem='hmlp' has patches of {HMlpStem.stride} pixels, got {patch_size=}")
    return HMlpStem(in_chans, dim)


STEMS = {'linear': _linear, 'hmlp': _hmlp}


def build_stem(name: str, *, in_chans: int, dim: int, patch_size: int) -> nn.Module:
    """The tokenizer 'linear', one convolution over patches, or 'hmlp'.

    Raises:
        ValueError: there is no such stem, or it does not have such patches.
    """
    return choose('stem', name, STEMS)(in_chans, dim, patch_size)
