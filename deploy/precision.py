"""Models in half precision whose exported graphs are strongly typed: every tensor has the type that the graph says.

Layers whose outputs would leave the range of the type are found by measurement on calibration images and keep
float32, with casts around them. Parts that compute in float32 by themselves (`.float()` in their code) stay so.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .export import evaluating

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}
# float16 ends at 65504; what comes this near to the end on some images may pass it on others
HEADROOM = 8.0


class Half(nn.Module):
    """A model of images in half precision, with float32 input and outputs.

    Args:
        model: copied; the copy is converted.
        precision: 'fp16' or 'bf16'.
        keep: names of modules that stay in float32.
    """

    def __init__(self, model: nn.Module, precision: str, keep: Iterable[str] = ()):
        super().__init__()
        if precision not in DTYPES:
            raise ValueError(f'precision must be one of {", ".join(DTYPES)}, got {precision=}')
        self.dtype = DTYPES[precision]
        self.model = copy.deepcopy(model).eval()
        self.keep = tuple(keep)
        kept = {self.model.get_submodule(name) for name in self.keep}
        _convert(self.model, self.dtype, kept)
        for module in kept:
            _compute_in_float32(module, self.dtype)

    def forward(self, images: Tensor) -> Any:
        return _cast(self.model(images.to(self.dtype)), torch.float32)

    def __getattr__(self, name: str) -> Any:
        """What exporters read of a backbone (sizes, feature_info, ...) is the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('model'), name)


def out_of_range(model: nn.Module, images: Iterable[Tensor], *, precision: str = 'fp16') -> dict[str, float]:
    """Which modules' outputs come near the end of the type's range, and their largest magnitudes.

    Args:
        model: measured in float32 and evaluation mode.
        images: inputs (B, C, H, W), one or several batches.
        precision: 'fp16' or 'bf16' (whose range is float32's: nothing comes near it).

    Returns:
        Names of the innermost such modules.

    Raises:
        ValueError: no images, or an output that is not finite in float32 either.
    """
    limit = torch.finfo(DTYPES[precision]).max / HEADROOM
    largest: dict[str, float] = {}

    def measure(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, list | tuple) else [output]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    largest[name] = max(largest.get(name, 0.0), tensor.abs().max().item())

        return hook

    handles = [module.register_forward_hook(measure(name)) for name, module in model.named_modules() if name]
    batches = 0
    try:
        with evaluating(model):
            for batch in images:
                model(batch)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError('calibration needs at least one image, got none')
    broken = [name for name, value in largest.items() if value != value or value == float('inf')]
    if broken:
        raise ValueError(f'the output of {broken[0]} is not finite in float32 either')
    high = {name: value for name, value in largest.items() if value > limit}
    return {name: value for name, value in high.items() if not any(other.startswith(f'{name}.') for other in high)}


def _convert(module: nn.Module, dtype: torch.dtype, kept: set[nn.Module]) -> None:
    """Weights and buffers in `dtype`, except inside `kept`, whose weights may not even fit into it."""
    if module in kept:
        return
    module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)
    for child in module.children():
        _convert(child, dtype, kept)


def _compute_in_float32(module: nn.Module, outside: torch.dtype) -> None:
    module.register_forward_pre_hook(lambda _, inputs: tuple(_cast(x, torch.float32) for x in inputs))
    module.register_forward_hook(lambda _, inputs, output: _cast(output, outside))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
