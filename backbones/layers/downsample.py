"""Convolutional stems and downsampling whose maps have ceil(size / stride) positions at every size."""

from typing import ClassVar

from torch import Tensor, nn

from .fold_norm import fold_into_previous
from .grid import pad_bottom_right, to_first, to_last
from .norm import NormFactory


class ConvDownsample(nn.Module):
    """[norm] -> strided convolution -> [norm], to (B, H, W, C).

    Where kernel and padding would drop the last rows or columns of a size that stride does not divide, zeros are added
    below and to the right first; at sizes where nothing is dropped, values are those of the bare convolution.

    Args:
        image: the input is (B, C, H, W), an image, instead of (B, H, W, C), a map.
    """

    replaceable: ClassVar[bool] = True  # nothing but downsampling happens here: see `Hierarchical.set_downsampling`

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        kernel: int,
        stride: int,
        padding: int,
        pre_norm: NormFactory | None = None,
        post_norm: NormFactory | None = None,
        image: bool = False,
    ):
        super().__init__()
        self.image, self.stride = image, stride
        self.drops_border = kernel > 2 * padding + 1
        self.pre_norm = pre_norm(in_dim) if pre_norm else nn.Identity()
        self.conv = nn.Conv2d(in_dim, dim, kernel, stride, padding)
        self.post_norm = post_norm(dim) if post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.image:
            x = to_first(self.pre_norm(x))
        if self.drops_border:
            x = pad_bottom_right(x, self.stride)
        return self.post_norm(to_last(self.conv(x)))

    def for_deploy(self) -> nn.Module:
        """The same layer in evaluation mode, with a norm that is affine inside the convolution before it."""
        self.post_norm = fold_into_previous(self.conv, self.post_norm)
        return self
