"""Backbones and whole tasks as torch.export programs, with dynamic batch and image size."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config

from ..kernels import use

MAX_BATCH, MAX_SIZE = 1024, 8192


def export_program(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    min_size: int | None = None,
) -> ExportedProgram:
    """The inference graph of a model.

    Args:
        model: takes float images (B, C, H, W), first argument, and returns tensors or lists of them. It is exported in
            evaluation mode and left as it was.
        example: one input, or the sequence of all inputs; the first must be images, the others have the same batch.
        dynamic_batch: the program takes every batch size; otherwise that of the example alone.
        dynamic_size: the program takes every image size from the model's `min_dynamic_size` on; otherwise that of the
            example alone.
        min_size: start of the range of sizes, if not the model's own.

    Returns:
        A program whose `.module()` computes what `model(example)` computes; the operations are PyTorch's own (kernels
        run their references).

    Raises:
        ValueError: the images are not (B, C, H, W), the model takes one size alone or reduces its tokens, the
            example is below the range, or it is too small for one graph of all sizes.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or inputs[0].ndim != 4:
        raise ValueError(f'the first example must be images (B, C, H, W), got {[tuple(t.shape) for t in inputs]}')
    smallest = min_size if min_size is not None else int(getattr(model, 'min_dynamic_size', 32))
    if dynamic_size:
        _check_dynamic(model, inputs[0], smallest)
    if dynamic_batch and inputs[0].shape[0] == 1:  # a batch of one would be taken for a constant
        inputs = tuple(torch.cat([t, t]) for t in inputs)
    first: dict[int, Any] = {}
    others: dict[int, Any] = {}
    if dynamic_batch:
        first[0] = others[0] = Dim('batch', min=1, max=MAX_BATCH)
    if dynamic_size:
        first[2], first[3] = Dim('height', min=smallest, max=MAX_SIZE), Dim('width', min=smallest, max=MAX_SIZE)
    shapes = (first, *(others for _ in inputs[1:])) if first else None
    with evaluating(model), use('torch'), symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        try:
            return torch.export.export(
                model, inputs, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
            )
        except UserError as error:
            if not dynamic_size or error.error_type != UserErrorType.CONSTRAINT_VIOLATION:
                raise
            raise ValueError(
                f'{type(model).__name__} does not export for all sizes from {smallest} on: one of its maps is a single '
                'row, column or window, of which torch makes another graph; '
                f'give a larger example (got {tuple(inputs[0].shape)}) or min_size (got {smallest})'
            ) from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in evaluation mode, without gradients; afterwards each part is as it was."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def _check_dynamic(model: nn.Module, images: Tensor, smallest: int) -> None:
    sizes = getattr(model, 'sizes', None)
    if sizes is not None and not sizes.dynamic:
        raise ValueError(
            f'dynamic_size needs a model of any size, {type(model).__name__} takes {sizes.height_width} '
            f'alone: {sizes.why}'
        )
    if any(getattr(module, 'one_size_per_graph', False) for module in model.modules()):
        raise ValueError(
            'dynamic_size needs a model with all its tokens: how many a reduction leaves follows from the size; export '
            'it once per size'
        )
    if min(images.shape[-2:]) < smallest:
        raise ValueError(
            f'the example must be at least {smallest} pixels high and wide for an export with dynamic '
            f'sizes, got {tuple(images.shape)}'
        )
