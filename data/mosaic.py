"""Mosaic: four pictures on one canvas (YOLOv4, arXiv:2004.10934; the geometry of YOLOX, arXiv:2107.08430)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .base import seeded
from .coco import CocoDetection
from .tensors import InstanceMasks
from .transforms import Sample, TransformSpec, boxes_of_masks, build, build_transforms


class Mosaic(Dataset):
    """Wraps a detection dataset: with probability `probability` a sample and three others, drawn at random, meet at a
    random centre of a canvas of twice `size`; `transforms` then bring it to the size for training (ResizeRange,
    LargeScaleJitter, RandomCrop).

    Each picture first passes the wrapped dataset's own transforms and is scaled to just fit `size`. Boxes and masks are
    cut at the canvas; instances that vanish are dropped. The target's `original_size` is the canvas's for a mosaic.

    Args:
        dataset: a CocoDetection or VOCDetection, or dict(type=CocoDetection, ...).
        size: (height, width) of a quarter; the canvas is (2 height, 2 width).
        probability: of a mosaic; otherwise the sample alone passes `transforms`.
        centre: range of the centre as a fraction of the canvas.
        fill: grey of uncovered pixels, 0..255.
        transforms: as in ImageDataset, after the mosaic.
    """

    def __init__(
        self,
        *,
        dataset: CocoDetection | Mapping[str, Any],
        size: tuple[int, int],
        probability: float = 1.0,
        centre: tuple[float, float] = (0.25, 0.75),
        fill: int = 114,
        transforms: Sequence[TransformSpec] | None = None,
    ) -> None:
        wrapped = build(dataset, 'dataset')
        if not isinstance(wrapped, CocoDetection):
            raise TypeError(f'dataset must be a detection dataset, got {type(wrapped).__name__}')
        if not (0 <= probability <= 1 and 0 < centre[0] <= centre[1] < 1):
            raise ValueError(f'probability must lie in 0..1 and centre in (0, 1), got {probability=}, {centre=}')
        self.dataset, self.size, self.probability, self.centre, self.fill = wrapped, size, probability, centre, fill
        self.metainfo = wrapped.metainfo
        self._after = build_transforms(transforms)
        self._sanitize = v2.SanitizeBoundingBoxes()

    def __len__(self) -> int:
        return len(self.dataset)

    def check(self, *, decode: bool = False) -> list[tuple[str, str]]:
        """The wrapped dataset's `check`."""
        return self.dataset.check(decode=decode)

    def aspect_ratios(self) -> list[float]:
        """The wrapped dataset's ratios; a mosaic has that of `size`."""
        if self.probability == 1:
            return [self.size[0] / self.size[1]] * len(self)
        return self.dataset.aspect_ratios()

    @property
    def skipped(self) -> int:
        """As ImageDataset.skipped."""
        return self.dataset.skipped

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, key)
        with seeded(self.dataset.seed, draw):
            sample, facts = self._one(index)
            if float(torch.rand(())) < self.probability:
                others = torch.randint(0, len(self), (3,)).tolist()
                sample = self._compose([sample] + [self._one(other)[0] for other in others])
                facts['original_size'] = (2 * self.size[0], 2 * self.size[1])
            sample = self.dataset.augment(sample, facts['file'], self._after)
            image, target = self.dataset.finish(sample)
        size = (int(image.shape[-2]), int(image.shape[-1]))
        return {'image': image, 'target': target | facts | {'draw': int(draw), 'size': size}}

    def _one(self, index: int) -> tuple[Sample, dict[str, Any]]:
        sample, facts = self.dataset.load(index)
        return self.dataset.augment(sample, facts['file']), facts

    def _compose(self, samples: list[Sample]) -> Sample:
        """One canvas from four samples: upper left, upper right, lower left, lower right of the centre."""
        height, width = 2 * self.size[0], 2 * self.size[1]
        low, high = self.centre
        fraction = low + torch.rand(2) * (high - low)
        row, column = int(height * float(fraction[0])), int(width * float(fraction[1]))
        canvas = torch.full((3, height, width), self.fill, dtype=torch.uint8)
        boxes, labels, masks = [], [], []
        for place, sample in enumerate(samples):
            image = sample['image'].as_subclass(Tensor)
            scale = min(self.size[0] / image.shape[1], self.size[1] / image.shape[2])
            shape = [max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale))]
            top = row - shape[0] if place < 2 else row
            left = column - shape[1] if place % 2 == 0 else column
            there, here = _overlap(top, left, shape, (height, width))
            canvas[:, there[0], there[1]] = F.resize(image, shape)[:, here[0], here[1]]
            ratio = torch.tensor([shape[1] / image.shape[2], shape[0] / image.shape[1]]).repeat(2)
            boxes.append(sample['boxes'].as_subclass(Tensor) * ratio + torch.tensor([left, top]).repeat(2))
            labels.append(sample['labels'])
            if 'masks' in sample:
                small = F.resize(sample['masks'], shape).as_subclass(Tensor)
                whole = torch.zeros(len(small), height, width, dtype=torch.uint8)
                whole[:, there[0], there[1]] = small[:, here[0], here[1]]
                masks.append(whole)
        together = torch.cat(boxes)
        clipped = together.clamp(min=0)
        clipped[:, 0::2] = clipped[:, 0::2].clamp(max=width)
        clipped[:, 1::2] = clipped[:, 1::2].clamp(max=height)
        result: Sample = {'image': tv_tensors.Image(canvas), 'labels': torch.cat(labels)}
        if masks:
            result['masks'] = InstanceMasks(torch.cat(masks))
            cut = (clipped != together).any(dim=1)
            if cut.any():
                clipped[cut] = boxes_of_masks(result['masks'].as_subclass(Tensor)[cut])
        result['boxes'] = tv_tensors.BoundingBoxes(clipped, format='XYXY', canvas_size=(height, width))  # type: ignore[call-overload]
        return self._sanitize(result)


def _overlap(
    top: int, left: int, shape: Sequence[int], canvas: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a picture of `shape` at (top, left) meets the canvas: slices of the canvas and of the picture."""
    spans = zip((top, left), shape, canvas)
    bounds = [(max(0, start), min(limit, start + length), start) for start, length, limit in spans]
    there = tuple(slice(a, b) for a, b, _ in bounds)
    here = tuple(slice(a - start, b - start) for a, b, start in bounds)
    return (there[0], there[1]), (here[0], here[1])
