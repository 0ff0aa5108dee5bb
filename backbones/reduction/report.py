"""What a reduced model saves: tokens per block, multiply-adds, images per second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from ..macs import count_macs, image_channels, on_meta, same_weights
from .interface import Tokens
from .timm_vit import REDUCED


@dataclass(frozen=True)
class Report:
    """Of a reduced model beside the same model without reduction.

    Attributes:
        method: its name.
        tokens: that leave each block, of an image; the mean over the images where their numbers differ.
        macs, unreduced_macs: multiply-adds of an image, all blocks in full, as papers count.
        macs_run, unreduced_macs_run: those that are carried out: the last block of a classifier that reads a class
            token leaves out the others, with reduction or without.
        macs_of_images: multiply-adds of each image that was given, for methods whose work depends on it.
        images_per_second, unreduced_images_per_second: at the batch size asked for; None if not measured.
    """

    method: str
    tokens: tuple[float, ...]
    macs: float
    unreduced_macs: float
    macs_run: float
    unreduced_macs_run: float
    macs_of_images: tuple[float, ...] = ()
    images_per_second: float | None = None
    unreduced_images_per_second: float | None = None

    @property
    def share(self) -> float:
        """Of the unreduced model's multiply-adds."""
        return self.macs / self.unreduced_macs

    def __str__(self) -> str:
        lines = [
            f'{self.method}: tokens after each block {", ".join(f"{n:g}" for n in self.tokens)}',
            f'{self.macs / 1e9:.3f} of {self.unreduced_macs / 1e9:.3f} GMACs, {self.share:.3f} of them '
            f'({self.macs_run / 1e9:.3f} of {self.unreduced_macs_run / 1e9:.3f} carried out)',
        ]
        if self.macs_of_images:
            each = [macs / 1e9 for macs in self.macs_of_images]
            lines.append(f'{min(each):.3f} to {max(each):.3f} GMACs an image, mean {sum(each) / len(each):.3f}')
        if self.images_per_second and self.unreduced_images_per_second:
            ratio = self.images_per_second / self.unreduced_images_per_second
            lines.append(
                f'{self.images_per_second:.1f} images/s, {ratio:.2f} times the {self.unreduced_images_per_second:.1f} '
                'without reduction'
            )
        return '\n'.join(lines)


def report(
    model: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    images: Tensor | None = None,
    batch: int | None = None,
    repeats: int = 5,
) -> Report:
    """What the reduction of a model saves.

    Args:
        model: from `reduce_tokens`.
        img_size: height and width; None for the size that the model is made for.
        images: (B, C, H, W), whose size is taken instead; tokens and multiply-adds are then those of these images.
        batch: measure throughput with this many images, the shortest of `repeats` passes of each side in turn.

    Raises:
        ValueError: the model is not reduced.
    """
    inner = _inner(model)
    if images is not None:
        size = (int(images.shape[-2]), int(images.shape[-1]))
    else:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size or inner.reduction.image_size)
    light = on_meta(model)
    without = unreduced(light)
    if images is None:
        tokens = tuple(
            float(each.x.shape[1])
            for each in trace_tokens(light, torch.empty(1, image_channels(light), *size, device='meta'))
        )
    else:
        counts = [_counted(each) for each in trace_tokens(model, images)]
        tokens = tuple(float(count.float().mean()) for count in counts)
    speeds: tuple[float | None, float | None] = (None, None)
    if batch is not None:
        speeds = _throughput(model, size, batch, repeats)
    own = same_weights(model).eval() if images is not None else model
    return Report(
        method=inner.reduction.method,
        tokens=tokens,
        macs=count_macs(light, size),
        unreduced_macs=count_macs(without, size),
        macs_run=count_macs(light, size, as_it_runs=True),
        unreduced_macs_run=count_macs(without, size, as_it_runs=True),
        macs_of_images=() if images is None else tuple(count_macs(own, image=image[None]) for image in images),
        images_per_second=speeds[0],
        unreduced_images_per_second=speeds[1],
    )


def unreduced(model: nn.Module) -> nn.Module:
    """The model without its reduction, sharing its weights; the argument is untouched."""
    _inner(model)
    plain = same_weights(model)
    inner = _inner(plain)
    if type(inner) in _PLAIN:
        del inner.reduction
        inner.__class__ = _PLAIN[type(inner)]
    else:
        inner.reduction = None
    return plain


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Tokens]]:
    """Inside, a forward pass puts into the list what leaves each block, all blocks run in full.

    Raises:
        ValueError: the model is not reduced.
    """
    reduction = _inner(model).reduction
    reduction.recorded = []
    try:
        yield reduction.recorded
    finally:
        reduction.recorded = None


@torch.no_grad()
def trace_tokens(model: nn.Module, images: Tensor) -> list[Tokens]:
    """What leaves each block for these images (B, C, H, W), with `place` telling where each original token is."""
    inner = _inner(model)
    with recording(model) as recorded:
        inner.forward_features(images)
        return list(recorded)


def token_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """For each block (B, H', W') int64: the token leaving it that each patch is part of, -1 if it was dropped.

    Args:
        images: (B, C, H, W), in patches of H' x W'.
    """
    maps = []
    for tokens in trace_tokens(model, images):
        reduction = _inner(model).reduction
        place = tokens.place
        if place is None:
            place = torch.arange(tokens.x.shape[1], device=tokens.x.device).expand(tokens.x.shape[0], -1)
        maps.append(place[:, reduction.prefix :].unflatten(1, reduction.recorded_grid))
    return maps


def _inner(model: Any) -> Any:
    inner = model.model if isinstance(model, FeatureGetterNet) else model
    if getattr(inner, 'reduction', None) is None:
        raise ValueError(f'the model has no reduction, got {type(inner).__name__}; make one with reduce_tokens')
    return inner


def _counted(tokens: Tokens) -> Tensor:
    """(B,), how many tokens each image has."""
    if tokens.alive is not None:
        return tokens.alive.sum(1)
    return torch.full((tokens.x.shape[0],), tokens.x.shape[1], device=tokens.x.device)


@torch.no_grad()
def _throughput(model: nn.Module, size: tuple[int, ...], batch: int, repeats: int) -> tuple[float, float]:
    first = next(model.parameters())
    images = torch.randn(batch, image_channels(model), *size, device=first.device, dtype=first.dtype)
    sides = [same_weights(model).eval(), unreduced(model).eval()]
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):  # the first pass warms up
        for side, seconds in zip(sides, times):
            start = time.perf_counter()
            side(images)
            if first.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return batch / min(times[0][1:]), batch / min(times[1][1:])


_PLAIN: dict[type, type] = {ours: theirs for theirs, ours in REDUCED.items()}
