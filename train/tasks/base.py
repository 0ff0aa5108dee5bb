"""A task: backbone + neck + head + preprocessing, trained by mmengine's loops.

`Task` is mmengine's model contract in one page: `forward(images, targets, mode)` with mode 'loss' (a dict of scalars),
'predict' (a list of results, one dict per image) or 'tensor' (the head's plain tensors, for export). Subclasses say how
features become a loss and a result.
"""

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..preprocess import Preprocess

MODES = ('loss', 'predict', 'tensor')


def build_part(config: dict[str, Any] | nn.Module, feature_info: Any) -> nn.Module:
    """Build a neck or a head, handing it `feature_info` (channels and strides of its inputs) where it asks for it."""
    if isinstance(config, nn.Module):
        return config
    kind = config['type']
    if isinstance(kind, str):
        kind = MODELS.get(kind)
    if 'feature_info' not in inspect.signature(kind).parameters:
        return MODELS.build(config)
    if feature_info is None:
        raise ValueError(f'{kind.__name__} needs a feature pyramid: build the backbone with features_only=True')
    return MODELS.build(config, default_args={'feature_info': feature_info})


class Task(BaseModel):
    """Base of the tasks.

    Args:
        backbone: dict(type=create_model, name=..., features_only=True, ...), or a module.
        head: dict(type=<head>, ...), or a module; it gets `feature_info` of the neck (or of the backbone).
        neck: dict(type=FPN, ...), or a module, or None.
        preprocess: dict(type=Preprocess, ...), or None for float images in [0, 1] without padding.
        auxiliary: {name: dict(type=<head>, ...) or a module}: heads on the backbone's maps that only add terms to the
            loss, called loss_<name>_...; predictions and exports do not run them.
        grad_checkpointing: recompute the backbone's activations in the backward pass (less memory, more time).
    """

    backbone: Any
    head: Any
    auxiliary: Any

    def __init__(
        self,
        *,
        backbone: dict[str, Any] | nn.Module,
        head: dict[str, Any] | nn.Module,
        neck: dict[str, Any] | nn.Module | None = None,
        preprocess: dict[str, Any] | nn.Module | None = None,
        auxiliary: Mapping[str, dict[str, Any] | nn.Module] | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__(data_preprocessor=Preprocess() if preprocess is None else preprocess)
        self.backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
        # A zoo's classifier has feature_info too, but hands out logits.
        classifier = isinstance(backbone, dict) and 'name' in backbone and not backbone.get('features_only')
        feature_info = None if classifier else getattr(self.backbone, 'feature_info', None)
        self.neck = None if neck is None else build_part(neck, feature_info)
        self.head = build_part(head, getattr(self.neck, 'feature_info', feature_info))
        parts = {name: build_part(part, feature_info) for name, part in (auxiliary or {}).items()}
        self.auxiliary = nn.ModuleDict(parts)
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing(True)
        if getattr(self.data_preprocessor, 'memory_format', None) is torch.channels_last:
            # nn.Module.to refuses where a parameter has five dimensions
            self._apply(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)

    def init_weights(self) -> None:
        """Nothing: constructors initialise, and mmengine must not call timm's init over loaded weights."""

    def compile_parts(self, **options: Any) -> None:
        """`torch.compile` the backbone and the neck in place (state-dict keys stay as they are)."""
        self.backbone.compile(**options)
        if self.neck is not None:
            self.neck.compile(**options)

    def extract_features(self, images: Tensor) -> tuple[Any, Any]:
        """(B, C, H, W) float -> the backbone's maps (a classifier's logits), and what the head takes of them."""
        maps = self.backbone(images)
        return maps, maps if self.neck is None else self.neck(maps)

    def forward(self, images: Tensor, targets: Any = None, mode: str = 'tensor') -> Any:
        """images (B, C, H, W) normalised float; targets: a list of B dicts (see densezoo.data), None for 'tensor'."""
        if mode not in MODES:
            raise ValueError(f'mode must be one of {MODES}, got {mode=}')
        maps, features = self.extract_features(images)
        if mode == 'loss':
            losses = self.losses(features, images, targets)
            for name, head in self.auxiliary.items():
                losses |= _under(name, head.loss(maps, targets))
            return losses
        if mode == 'predict':
            return self.results(features, images, targets)
        return self.tensors(features, images)

    def losses(self, features: Any, images: Tensor, targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return self.head.loss(features, targets)

    def results(self, features: Any, images: Tensor, targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.head.predict(
            features, [target['size'] for target in targets], [target['original_size'] for target in targets]
        )

    def tensors(self, features: Any, images: Tensor) -> Any:
        return self.head(features)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, 'OrderedDict[str, Tensor]']:
        """The sum of the terms called `loss_*`, and everything that is logged (detached: logging holds no graph)."""
        terms = [value for name, value in losses.items() if name.startswith('loss')]
        if not terms:
            raise ValueError(f'{type(self.head).__name__}.loss returned no term called loss_*, got {sorted(losses)}')
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        logged = OrderedDict(loss=total.detach())
        if len(losses) > 1:
            logged.update((name, value.detach()) for name, value in losses.items())
        return total, logged


def _under(name: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of an auxiliary head under its name: loss_seg -> loss_<name>_seg, pixel_accuracy -> <name>_..."""
    return {
        f'loss_{name}_{key.removeprefix("loss_")}' if key.startswith('loss') else f'{name}_{key}': value
        for key, value in losses.items()
    }
