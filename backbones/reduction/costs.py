"""What single images cost, for methods that keep as many tokens as an image needs."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def image_macs(model: nn.Module, images: Tensor) -> Tensor:
    """Multiply-adds that each image needs when it runs alone, of matrix products, convolutions and attention.

    Args:
        model: in evaluation mode, on the images' device.
        images: (B, channels, H, W), as the model takes them.

    Returns:
        (B,) float64.

    Raises:
        ValueError: the model is in training mode, where a cost is not that of inference.
    """
    if model.training:
        raise ValueError('image_macs needs a model in evaluation mode; call model.eval() first')
    model = copy.deepcopy(model).requires_grad_(False)  # the counter cannot follow modules that return parameters
    costs = []
    # PyTorch counts attention on a CPU in its plain form alone
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for image in images:
            with FlopCounterMode(display=False) as counter:
                model(image[None])
            costs.append(counter.get_total_flops() / 2)
    return torch.tensor(costs, dtype=torch.float64)
