"""From a list of images to a normalised, padded batch on the model's device."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor


class Preprocess(BaseDataPreprocessor):
    """Stack images into one float batch: normalise, then zero-pad right and bottom.

    The images travel to the device as they are (uint8 is a quarter of float) and become float there.

    Args:
        mean, std: one number per channel, in 0..255 units (images are uint8, or float in 0..255). `None` for both:
            uint8 images are divided by 255 and float images are taken as they are, in [0, 1] (restoration).
        divisor: the padded height and width are the batch's maximum rounded up to a multiple of this.
        channels_last: memory format of the batch, and of the model's convolution weights.

    Call: `preprocess({'images': list of (C, H, W), 'targets': list of dict}, training)` returns
    `{'images': (B, C, H', W') float32, 'targets': ...}`; the targets' tensors follow to the device in training only.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        divisor: int = 1,
        channels_last: bool = True,
    ) -> None:
        super().__init__(non_blocking=True)
        if (mean is None) != (std is None):
            raise ValueError(f'mean and std must both be given or both be None, got {mean=}, {std=}')
        if mean is not None and std is not None and len(mean) != len(std):
            raise ValueError(f'mean and std must have the same length, got {mean=}, {std=}')
        if std is not None and min(std) <= 0:
            raise ValueError(f'std must be positive, got {std=}')
        if divisor < 1:
            raise ValueError(f'divisor must be at least 1, got {divisor=}')
        self.divisor = divisor
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.normalise = mean is not None
        # Not saved with the weights: they belong to the config, and a checkpoint must load into another recipe.
        self.register_buffer('mean', torch.tensor(mean or (0.0,)).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std or (1.0,)).view(-1, 1, 1), persistent=False)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        images, targets = data['images'], data.get('targets')
        if training and targets is not None and self.device.type != 'cpu':
            targets = [self._to_device(target) for target in targets]
        return {'images': self.batch(images), 'targets': targets}

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images (C, H, W), uint8 or float, of any sizes -> (B, C, H', W') float32."""
        height = _round_up(max(image.shape[-2] for image in images), self.divisor)
        width = _round_up(max(image.shape[-1] for image in images), self.divisor)
        if all(image.shape[-2:] == (height, width) and image.dtype == images[0].dtype for image in images):
            stacked = torch.stack(list(images)).to(self.device, non_blocking=True)
            return self._float(stacked).contiguous(memory_format=self.memory_format)
        batch = torch.zeros((len(images), images[0].shape[0], height, width), device=self.device).contiguous(
            memory_format=self.memory_format
        )
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]] = self._float(image.to(self.device, non_blocking=True))
        return batch

    def _to_device(self, target: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in target.items()
        }

    def _float(self, images: Tensor) -> Tensor:
        if self.normalise:
            return (images - self.mean) / self.std
        return images.float() if images.is_floating_point() else images / 255.0


def _round_up(size: int, divisor: int) -> int:
    return (size + divisor - 1) // divisor * divisor
