"""Transforms from configs, and the few that torchvision.transforms.v2 lacks.

A list of transforms may hold callables and dicts such as dict(type=v2.RandomHorizontalFlip, p=0.5); `build_transforms`
makes them. Each gets one sample, a dict of tv_tensors, and returns it:
    'image' Image (3, H, W) uint8;  'boxes' BoundingBoxes (N, 4) XYXY, 'labels' (N,), 'masks' InstanceMasks (N, H, W);
    'mask' SemanticMask (H, W);  'clean' Image (restoration).
Draw random numbers from torch (or numpy, random): the dataset seeds all three for each sample.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from .tensors import IGNORE, InstanceMasks, SemanticMask

Sample = dict[str, Any]
TransformSpec = Mapping[str, Any] | Callable[[Sample], Sample]


# ------------------------------------------------------------------------------------------------ from configs


def build(spec: Any, argument: str = 'transforms') -> Any:
    """An object from dict(type=class or dotted name, **arguments), recursively; anything else is returned as it is.

    Strings are accepted where v2 wants an enum: `interpolation='bicubic'`, `dtype='float32'`.
    Raises TypeError or ValueError in one line: an unknown name or argument with the nearest match.
    """
    if isinstance(spec, (list, tuple)):
        return type(spec)(build(item, argument) for item in spec)
    if not isinstance(spec, Mapping) or 'type' not in spec:
        return spec
    kind = spec['type']
    if isinstance(kind, str):
        kind = _import(kind, argument)
    if not callable(kind):
        raise TypeError(f'{argument}: type must be a class, a callable or its dotted name, got {kind!r}')
    given = {key: build(spec[key], f'{argument}: {kind.__name__}.{key}') for key in spec if key != 'type'}
    _check_names(kind, given, argument)
    if isinstance(given.get('interpolation'), str):
        given['interpolation'] = InterpolationMode(given['interpolation'])
    if isinstance(given.get('dtype'), str):
        given['dtype'] = getattr(torch, given['dtype'].removeprefix('torch.'))
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f'{argument}: {kind.__name__}: {error}') from None


def build_transforms(specs: Sequence[TransformSpec] | TransformSpec | None) -> list[Callable[[Sample], Sample]]:
    """The callables of a list of specs (see `build`); one spec alone and None are accepted too."""
    if specs is None:
        return []
    if isinstance(specs, Mapping) or not isinstance(specs, Sequence):
        specs = [specs]
    made = [build(spec, f'transforms[{number}]') for number, spec in enumerate(specs)]
    for number, transform in enumerate(made):
        if not callable(transform):
            raise TypeError(f'transforms[{number}] must be a callable or dict(type=..., ...), got {specs[number]!r}')
    return made


def _import(name: str, argument: str) -> Any:
    module, _, attribute = name.rpartition('.')
    if not module:
        raise ValueError(f"{argument}: type={name!r} must be a class or a dotted name like 'package.module.{name}'")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{argument}: type={name!r} cannot be imported ({error})') from None
    if not hasattr(found, attribute):
        near = difflib.get_close_matches(attribute, dir(found), n=1)
        hint = f'; nearest: {module}.{near[0]}' if near else ''
        raise ValueError(f'{argument}: type={name!r}: {module} has no {attribute!r}{hint}')
    return getattr(found, attribute)


def _check_names(kind: Any, given: dict[str, Any], argument: str) -> None:
    try:
        parameters = inspect.signature(kind).parameters
    except ValueError:
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f'; nearest: {near[0]!r}' if near else ''
            raise TypeError(
                f'{argument}: {kind.__name__} has no argument {name!r}, it has {", ".join(parameters)}{hint}'
            )


# ------------------------------------------------------------------------------------------------ resizing


def _picture_size(flat: list[Any]) -> tuple[int, int]:
    for item in flat:
        if isinstance(item, tv_tensors.Image):
            return int(item.shape[-2]), int(item.shape[-1])
    raise TypeError('a sample must hold an image (torchvision.tv_tensors.Image)')


class ResizeRange(v2.Transform):
    """Resize keeping the aspect ratio: the shorter edge to `short`, but the longer edge at most `long`; both times a
    factor drawn from `ratio`. ADE20K's training: short=512, long=2048, ratio=(0.5, 2.0). COCO: short=800, long=1333.

    Args:
        short: target of the shorter edge in pixels, or a range (low, high) drawn per image (both ends included).
        long: bound of the longer edge; None for no bound.
        ratio: (low, high), a factor on `short` and `long` drawn uniformly per image.
        interpolation: of the picture; masks are always resized by nearest neighbour.
    """

    def __init__(
        self,
        *,
        short: int | tuple[int, int],
        long: int | None = None,
        ratio: tuple[float, float] = (1.0, 1.0),
        interpolation: InterpolationMode | str = InterpolationMode.BILINEAR,
    ) -> None:
        super().__init__()
        low, high = (short, short) if isinstance(short, int) else tuple(short)
        if not 0 < low <= high:
            raise ValueError(f'short must be positive or a range (low, high), got {short=}')
        if long is not None and long < low:
            raise ValueError(f'long must be at least short, got {long=}, {short=}')
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f'ratio must be (low, high) with 0 < low <= high, got {ratio=}')
        self.short, self.long, self.ratio = (int(low), int(high)), long, (float(ratio[0]), float(ratio[1]))
        self.interpolation = InterpolationMode(interpolation)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _picture_size(flat_inputs)
        short = self.short[0]
        if self.short[1] > short:
            short = int(torch.randint(short, self.short[1] + 1, ()))
        scale = short / min(height, width)
        if self.long is not None:
            scale = min(scale, self.long / max(height, width))
        if self.ratio[1] > self.ratio[0]:
            scale *= self.ratio[0] + float(torch.rand(())) * (self.ratio[1] - self.ratio[0])
        else:
            scale *= self.ratio[0]
        return {'size': [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params['size'], interpolation=self.interpolation, antialias=True)


class ResizeImageOnly(ResizeRange):
    """ResizeRange for the picture alone: the semantic mask stays at its size, as segmentation is evaluated there."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return super().transform(inpt, params) if isinstance(inpt, tv_tensors.Image) else inpt


# ------------------------------------------------------------------------------------------------ cropping


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Smallest boxes around masks: (N, H, W), non-zero inside -> (N, 4) float32 XYXY in pixel edges; zeros if empty."""
    count, height, width = masks.shape
    boxes = torch.zeros(count, 4)
    if count == 0:
        return boxes
    masks = masks.as_subclass(Tensor).ne(0).view(torch.uint8)
    rows, columns = masks.amax(dim=2), masks.amax(dim=1)
    boxes[:, 0] = columns.argmax(dim=1)
    boxes[:, 1] = rows.argmax(dim=1)
    boxes[:, 2] = width - columns.flip(1).argmax(dim=1)
    boxes[:, 3] = height - rows.flip(1).argmax(dim=1)
    boxes[rows.amax(dim=1) == 0] = 0
    return boxes


class BoxesFromMasks(torch.nn.Module):
    """Sets every box to the smallest one around its instance mask (after rotations and warps, whose boxes are loose)
    and drops instances whose mask has become empty. Samples without instance masks pass unchanged."""

    def forward(self, sample: Sample) -> Sample:
        if 'masks' not in sample:
            return sample
        boxes = boxes_of_masks(sample['masks'])
        return _keep(sample | {'boxes': tv_tensors.wrap(boxes, like=sample['boxes'])}, boxes[:, 2] > boxes[:, 0])


class RandomCrop(v2.RandomCrop):
    """v2.RandomCrop, padding where the picture is smaller, that keeps boxes and masks honest.

    A box that the crop cuts is shrunk to what is visible (of its mask, where there are masks), and instances with less
    than `min_visible` of their box area, less than `min_size` pixels on a side or an empty mask are dropped with their
    labels. New pixels: `fill` in the picture, 255 in a semantic mask, 0 in instance masks.
    A picture smaller than the crop is padded at the right and bottom only (v2 pads on both sides at random).

    Args:
        size: (height, width) of the result.
        min_visible: 0 keeps any visible piece.
        min_size: in pixels, at least 1.
        fill: 0..255 for each channel or for all.
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int],
        min_visible: float = 0.0,
        min_size: float = 1.0,
        fill: float | tuple[float, ...] = 0,
    ) -> None:
        super().__init__(size, pad_if_needed=True, fill=fill)
        self.sanitize = v2.SanitizeBoundingBoxes(min_size=min_size, min_area=min_size**2)
        self.min_visible = min_visible

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = _picture_size(flat_inputs)
        bottom, right = max(0, self.size[0] - height), max(0, self.size[1] - width)
        top, left = self.place(flat_inputs, height + bottom, width + right)
        return {
            'needs_pad': bool(bottom or right),
            'padding': [0, 0, right, bottom],
            'needs_crop': (height + bottom, width + right) != tuple(self.size),
            'top': top,
            'left': left,
            'height': self.size[0],
            'width': self.size[1],
        }

    def place(self, flat_inputs: list[Any], height: int, width: int) -> tuple[int, int]:
        """(top, left) of the crop inside the padded picture of (height, width)."""
        top = int(torch.randint(0, height - self.size[0] + 1, ()))
        return top, int(torch.randint(0, width - self.size[1] + 1, ()))

    def forward(self, *inputs: Any) -> Any:
        sample = inputs[0]
        if 'boxes' not in sample:
            return super().forward(*inputs)
        before = sample['boxes'].as_subclass(Tensor)
        area = (before[:, 2:] - before[:, :2]).prod(dim=1)
        cropped = super().forward(sample)
        after = cropped['boxes'].as_subclass(Tensor)
        visible = (after[:, 2:] - after[:, :2]).prod(dim=1)
        keep = visible > self.min_visible * area
        if 'masks' in cropped:
            cut = keep & (visible < area - 1e-3)
            if cut.any():
                after[cut] = boxes_of_masks(cropped['masks'][cut])
        return self.sanitize(_keep(cropped, keep))


def _keep(sample: Sample, keep: Tensor) -> Sample:
    """The instances of a detection sample where `keep` (N,) is True."""
    if bool(keep.all()):
        return sample
    chosen: Sample = {}
    for name in ('boxes', 'masks'):
        if name in sample:
            chosen[name] = tv_tensors.wrap(sample[name].as_subclass(Tensor)[keep], like=sample[name])
    return sample | chosen | {'labels': sample['labels'][keep]}


class LargeScaleJitter(torch.nn.Module):
    """Large-scale jitter (Ghiasi et al., arXiv:2012.07177): v2.ScaleJitter, then a crop or padding to exactly `size`.

    Args:
        size: (height, width) of the result.
        scale: range of the factor on the scale at which the picture just fits `size`; (0.1, 2.0) is the paper's.
        min_visible, fill: as in RandomCrop.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int] = (1024, 1024),
        scale: tuple[float, float] = (0.1, 2.0),
        min_visible: float = 0.0,
        fill: float | tuple[float, ...] = 0,
    ) -> None:
        super().__init__()
        # v2.ScaleJitter divides target_size[1] by the height and target_size[0] by the width.
        self.jitter = v2.ScaleJitter(target_size=(size[1], size[0]), scale_range=scale, antialias=True)
        self.crop = RandomCrop(size=size, min_visible=min_visible, fill=fill)

    def forward(self, sample: Sample) -> Sample:
        return self.crop(self.jitter(sample))


class CropWithoutOneClassDominating(RandomCrop):
    """RandomCrop for segmentation that is drawn again (at most `tries` times) while one class covers more than
    `cat_max_ratio` of the labelled pixels: sky and road would otherwise fill many crops."""

    def __init__(
        self,
        *,
        size: int | tuple[int, int],
        cat_max_ratio: float = 0.75,
        tries: int = 10,
        fill: float | tuple[float, ...] = 0,
    ) -> None:
        super().__init__(size=size, fill=fill)
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f'cat_max_ratio must lie in (0, 1], got {cat_max_ratio=}')
        self.cat_max_ratio, self.tries = cat_max_ratio, tries

    def place(self, flat_inputs: list[Any], height: int, width: int) -> tuple[int, int]:
        mask = next((item for item in flat_inputs if isinstance(item, SemanticMask)), None)
        if mask is None:
            raise TypeError('CropWithoutOneClassDominating needs a semantic mask in the sample; use RandomCrop')
        for _ in range(self.tries):
            top, left = super().place(flat_inputs, height, width)
            window = mask.as_subclass(Tensor)[..., top : top + self.size[0], left : left + self.size[1]]
            counts = torch.bincount(window[window != IGNORE].flatten().long())
            if len(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return top, left


__all__ = [
    'BoxesFromMasks',
    'CropWithoutOneClassDominating',
    'InstanceMasks',
    'LargeScaleJitter',
    'RandomCrop',
    'ResizeImageOnly',
    'ResizeRange',
    'SemanticMask',
    'boxes_of_masks',
    'build',
    'build_transforms',
]
