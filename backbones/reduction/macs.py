"""Multiply-adds of a model at an image size, counted by PyTorch on the meta device: no memory, no arithmetic."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, in evaluation mode; the model's weights are not copied."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to('meta')
        # the counter cannot follow modules that return parameters which require gradients
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).eval()


def count_macs(model: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> float:
    """Multiply-adds for one image, of matrix products, convolutions and attention.

    Args:
        image_size: height and width.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(model)(meta_image(image_size, in_chans))
    return counter.get_total_flops() / 2


def meta_image(image_size: tuple[int, int], in_chans: int) -> Tensor:
    """One image without values."""
    return torch.empty(1, in_chans, *image_size, device='meta')
