"""Parameter groups from the model's own layer map, and one optimizer wrapper for float32, bfloat16 and float16.

Groups follow timm's `param_groups_layer_decay` (itself from BEiT, arXiv 2106.08254): the backbone's `group_matcher()`
orders its parameters into layers; a layer's learning rate is multiplied by `layer_decay ** (last - layer)`; what the
matcher does not name, neck and head included, is the last layer and learns at the full rate. Parameters of one
dimension and those in `no_weight_decay()` are not decayed; those that a part's `lr_scales()` names learn at a rate that
is multiplied by its factor.
"""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper as MMEngineOptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from .loops import unwrapped

AMP_TYPES = {None: None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_UNMATCHED = '\0'  # a parameter name that no pattern matches


def layer_ids(task: nn.Module) -> dict[str, int]:
    """Name of each parameter -> its layer, 0 for the stem; neck, head and unmatched parameters are the last layer."""
    backbone: Any = getattr(task, 'backbone', task)
    prefix = '' if backbone is task else 'backbone.'
    names = [name for name, _ in backbone.named_parameters()]
    if not hasattr(backbone, 'group_matcher'):
        raise ValueError(f'layer_decay needs a backbone with group_matcher(), {type(backbone).__name__} has none')
    matcher = backbone.group_matcher(coarse=False)
    if isinstance(matcher, Mapping):
        named = [(name, None) for name in [*names, _UNMATCHED]]
        ids = group_with_matcher(iter(named), dict(matcher), reverse=True)
        last = ids.pop(_UNMATCHED)
    else:
        ids = group_with_matcher(iter([(name, None) for name in names]), matcher, reverse=True)
        last = max(ids.values()) + (0 if backbone is task else 1)
    return {name: last for name, _ in task.named_parameters()} | {prefix + name: i for name, i in ids.items()}


def undecayed_names(task: nn.Module) -> list[str]:
    """Patterns of the parameters that the parts' own `no_weight_decay()` exempt, with the parts' prefixes."""
    parts: list[tuple[str, Any]] = [('', task)] + [(name + '.', part) for name, part in task.named_children()]
    return [
        prefix + pattern
        for prefix, part in parts
        if hasattr(part, 'no_weight_decay')
        for pattern in part.no_weight_decay()
    ]


def learning_rate_scales(task: nn.Module) -> dict[str, float]:
    """Patterns of parameters that learn at another rate, by the parts' own `lr_scales()`, and the factor."""
    parts: list[tuple[str, Any]] = [('', task)] + [(name + '.', part) for name, part in task.named_children()]
    return {
        prefix + pattern: factor
        for prefix, part in parts
        if hasattr(part, 'lr_scales')
        for pattern, factor in part.lr_scales().items()
    }


def parameter_groups(
    task: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    min_scale: float = 0.0,
    backbone_scale: float = 1.0,
    decay_1d: bool = False,
) -> list[dict[str, Any]]:
    """Optimizer groups: dicts of `params`, `lr`, `weight_decay`, `lr_scale` and `names`.

    Args:
        task: a Task, or a bare backbone.
        layer_decay: factor per layer, in (0, 1]; 1 leaves one learning rate.
        min_scale: lower bound of the factors of layers.
        backbone_scale: factor of the whole backbone, beside that of its layers (0.1 for DETR and its kin).
        decay_1d: also decay biases, norms and other parameters of one dimension.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f'layer_decay must lie in (0, 1], got {layer_decay=}')
    ids = layer_ids(task) if layer_decay < 1 else {}
    last = max(ids.values(), default=0)
    exempt, scales = undecayed_names(task), learning_rate_scales(task)
    groups: dict[tuple[int, bool, float], dict[str, Any]] = {}
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = (not decay_1d and parameter.ndim <= 1) or any(fnmatch.fnmatch(name, pattern) for pattern in exempt)
        layer = ids.get(name, last)
        own = next((factor for pattern, factor in scales.items() if fnmatch.fnmatch(name, pattern)), 1.0)
        if name.startswith('backbone.'):
            own *= backbone_scale
        key = layer, plain, own
        if key not in groups:
            scale = own * max(min_scale, layer_decay ** (last - layer))
            groups[key] = {
                'params': [],
                'lr': lr * scale,
                'weight_decay': 0.0 if plain else weight_decay,
                'lr_scale': scale,
                'names': [],
            }
        groups[key]['params'].append(parameter)
        groups[key]['names'].append(name)
    return list(groups.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor:
    """mmengine constructor: `optim_wrapper = dict(..., constructor='LayerDecayConstructor', paramwise_cfg=dict(...))`.

    paramwise_cfg: `layer_decay` (1.0), `min_scale` (0.0), `backbone_scale` (1.0), `decay_1d` (False), see
    `parameter_groups`.
    """

    options = ('layer_decay', 'min_scale', 'backbone_scale', 'decay_1d')

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop('optimizer'))
        self.paramwise = dict(paramwise_cfg or {})
        for name in self.paramwise:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, 1, 0.0)
                raise ValueError(f'paramwise_cfg has no option {name!r}: did you mean {near[0]!r}? ({self.options})')
        if 'lr' not in self.optimizer:
            raise ValueError('optim_wrapper.optimizer needs an explicit lr')

    def __call__(self, model: nn.Module) -> MMEngineOptimWrapper:
        groups = parameter_groups(
            unwrapped(model),
            lr=self.optimizer['lr'],
            weight_decay=self.optimizer.get('weight_decay', 0.0),
            **self.paramwise,
        )
        for group in groups:
            del group['names']
        self.wrapper.setdefault('type', OptimWrapper)
        self.wrapper['optimizer'] = OPTIMIZERS.build(self.optimizer, default_args={'params': groups})
        return OPTIM_WRAPPERS.build(self.wrapper)


class OptimWrapper(MMEngineOptimWrapper):
    """mmengine's wrapper (gradient accumulation, clipping) with autocast on any device and no device sync per step.

    Args:
        optimizer: a torch optimizer.
        accumulative_counts: iterations per parameter update.
        clip_grad: dict(max_norm=1.0), or dict(type='value', clip_value=...).
        amp: None, 'bf16' (CPU and GPU) or 'fp16' (GPU, with a gradient scaler).

    Attributes:
        grad_norm: the last clipped update's total norm (a scalar tensor), None without clipping.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: dict[str, Any] | None = None,
        amp: str | None = None,
    ) -> None:
        super().__init__(optimizer, accumulative_counts, None if clip_grad is None else dict(clip_grad))
        if amp not in AMP_TYPES:
            raise ValueError(f'amp must be one of {list(AMP_TYPES)}, got {amp=}')
        if amp == 'fp16' and not torch.cuda.is_available():
            raise ValueError("amp='fp16' needs a CUDA device; on a CPU use amp='bf16'")
        self.amp = amp
        self.scaler = torch.amp.GradScaler('cuda') if amp == 'fp16' else None
        self.grad_norm: Tensor | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        with super().optim_context(model), torch.autocast(device, AMP_TYPES[self.amp], enabled=self.amp is not None):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        super().backward(loss if self.scaler is None else self.scaler.scale(loss), **kwargs)

    def step(self, **kwargs: Any) -> None:
        if self.scaler is None:
            super().step(**kwargs)
            return
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if parameters:
            self.grad_norm = self.clip_func(parameters, **self.clip_grad_kwargs)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.scaler is not None:
            state['scaler'] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        scaler = state_dict.pop('scaler', None)
        if self.scaler is not None and scaler is not None:
            self.scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)
