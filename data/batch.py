"""A batch that crosses from a worker to the main process in one piece of shared memory.

A DataLoader sends each tensor of a batch through a shared-memory file of its own: forty files for eight pictures with
four small tensors each, which costs more than decoding small pictures. `Batch` is a plain dict in every other respect.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGN = 64
_SMALL = 1 << 16  # smaller tensors are copied out, so that whoever keeps a few of them does not keep the batch


class Batch(dict):
    """{'images': list of Tensor, 'targets': list of dict}; pickled as one buffer and the places of its tensors."""

    def __copy__(self) -> 'Batch':
        return Batch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        tensors: list[Tensor] = []
        skeleton = _replaced(dict(self), tensors)
        places, length = [], 0
        for tensor in tensors:
            places.append(_Place.of(tensor, length))
            length += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        buffer = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(length))
        for tensor, place in zip(tensors, places):
            if tensor.numel():
                place.view(buffer).copy_(tensor)
        return _restored, (skeleton, buffer, places)


class _Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor, start: int) -> '_Place':
        turned = tensor.ndim == 3 and not tensor.is_contiguous() and tensor.permute(1, 2, 0).is_contiguous()
        return cls(start, tuple(tensor.shape), tensor.dtype, turned)

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor of this place inside the buffer, in the memory layout that it had."""
        shape = (*self.shape[1:], self.shape[0]) if self.channels_last else self.shape
        count = 1
        for edge in shape:
            count *= edge
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = buffer[self.start : self.start + count * self.dtype.itemsize].view(self.dtype).view(shape)
        return flat.permute(2, 0, 1) if self.channels_last else flat


class _Slot(int):
    """Number of a tensor that was taken out of the skeleton."""


def _replaced(item: Any, tensors: list[Tensor]) -> Any:
    if type(item) is Tensor and item.device.type == 'cpu' and not item.requires_grad:
        tensors.append(item.detach())
        return _Slot(len(tensors) - 1)
    if type(item) is dict:
        return {key: _replaced(value, tensors) for key, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(_replaced(value, tensors) for value in item)
    return item


def _restored(skeleton: dict[str, Any], buffer: Tensor, places: list[_Place]) -> Batch:
    tensors = _tensors(buffer, places)
    return Batch(_filled(skeleton, list(tensors)))


def _tensors(buffer: Tensor, places: list[_Place]) -> Iterator[Tensor]:
    for place in places:
        view = place.view(buffer)
        yield view.clone() if view.numel() * view.element_size() < _SMALL else view


def _filled(item: Any, tensors: list[Tensor]) -> Any:
    if type(item) is _Slot:
        return tensors[item]
    if type(item) is dict:
        return {key: _filled(value, tensors) for key, value in item.items()}
    if type(item) in (list, tuple):
        return type(item)(_filled(value, tensors) for value in item)
    return item
