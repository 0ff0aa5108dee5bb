"""Multiply-adds of a model at an image size, counted by PyTorch on the meta device: no memory, no arithmetic."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_Model = TypeVar('_Model', bound=nn.Module)


def same_weights(model: _Model) -> _Model:
    """A copy that shares the model's weights, without gradients."""
    return _copied(model, lambda tensor: tensor)


def on_meta(model: _Model) -> _Model:
    """A copy without values, in evaluation mode; the model's weights are not copied."""
    return _copied(model, lambda tensor: tensor.to('meta')).eval()


def _copied(model: _Model, change: Callable[[Tensor], Tensor]) -> _Model:
    memo: dict[int, object] = {id(buffer): change(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(change(parameter.detach()), requires_grad=False)
    return copy.deepcopy(model, memo)


def count_macs(
    model: Any, image_size: tuple[int, int] | None = None, *, image: Tensor | None = None, as_it_runs: bool = False
) -> float:
    """Multiply-adds for one image, of matrix products, convolutions and attention.

    Args:
        model: in evaluation mode, on the meta device if an image is not given.
        image_size: height and width.
        image: (1, C, H, W), for models whose work depends on the image.
        as_it_runs: otherwise all blocks are counted in full, as papers do, also where the last one of a classifier
            computes the prefix tokens alone.
    """
    x = torch.empty(1, image_channels(model), *(image_size or ()), device='meta') if image is None else image
    # the counter does not know the fused attention of CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        if as_it_runs or getattr(model, 'features_only', False) or not hasattr(model, 'forward_head'):
            model(x)
        else:
            model.forward_head(model.forward_features(x))
    return counter.get_total_flops() / 2


def image_channels(model: Any) -> int:
    """Of the images: as the model says, timm's by the first convolution."""
    own = getattr(model, 'in_chans', None)
    return own or next(part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d))
