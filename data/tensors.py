"""The two kinds of masks as tv_tensors, so that torchvision's v2 transforms fill new pixels with the right value.

torchvision fills a mask that is padded, rotated or warped with the `fill` meant for the picture: 0 is then a class of a
semantic mask, and grey (114) is True in an instance mask. Here the fill is a property of the kind: the ignore value for
a semantic mask, 0 for instance masks, whatever `fill` a transform was given.
"""

from typing import Any

from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

IGNORE = 255


class SemanticMask(tv_tensors.Mask):
    """Class ids (H, W) uint8, 255 where nothing is known."""

    fill = IGNORE


class InstanceMasks(tv_tensors.Mask):
    """One mask per box, (N, H, W) uint8 of 0 and 1."""

    fill = 0


def _with_own_fill(functional: Any) -> None:
    def kernel(inpt: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs['fill'] = type(inpt).fill
        out = functional(inpt.as_subclass(tv_tensors.Mask), *args, **kwargs)
        return out.as_subclass(type(inpt))

    for kind in (SemanticMask, InstanceMasks):
        F.register_kernel(functional, kind)(kernel)


for _functional in (F.pad, F.affine, F.rotate, F.perspective, F.elastic):
    _with_own_fill(_functional)
