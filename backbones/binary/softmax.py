"""Softmax attention that linear attention takes the place of: its weights, and what it becomes in a last stage."""

# C channels, h heads, d head width
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Attention, TokenAttention
from ..pvt_v2 import SpatialReductionAttention
from ..twins import LocallyGroupedAttention
from .replace import Place, attentions, replace_attention

SOURCES: tuple[type[nn.Module], ...] = (
    SpatialReductionAttention,
    LocallyGroupedAttention,
    Attention,
    TokenAttention,
)


class SoftmaxAttention(Attention):
    """The attention of a last stage: the model's own, with queries, keys and values in one layer."""

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Separate projections become one, in place."""
        for name in ('weight', 'bias'):
            parts = [state.pop(f'{prefix}{layer}.{name}', None) for layer in ('q', 'kv')]
            if parts[0] is not None and parts[1] is not None:
                state[f'{prefix}qkv.{name}'] = torch.cat([parts[0], parts[1]])
        _drop_reduction(state, prefix)


def share_projection(state: dict[str, Tensor], prefix: str) -> None:
    """`to_qk` and `to_v` out of the projections of queries and values of softmax attention, in place.

    Those are in `q` and `kv`, or in `qkv`; convolution and norm of a spatial reduction are dropped.
    """
    for name in ('weight', 'bias'):
        if f'{prefix}qkv.{name}' in state:
            query, _, value = state.pop(f'{prefix}qkv.{name}').chunk(3)
        elif f'{prefix}q.{name}' in state:
            query, value = state.pop(f'{prefix}q.{name}'), state.pop(f'{prefix}kv.{name}').chunk(2)[1]
        else:
            continue
        state[f'{prefix}to_qk.{name}'], state[f'{prefix}to_v.{name}'] = query, value
    _drop_reduction(state, prefix)


def split_projection(state: dict[str, Tensor], prefix: str) -> None:
    """`q` and `kv` out of `qkv`, in place; convolution and norm of a spatial reduction are dropped."""
    for name in ('weight', 'bias'):
        if f'{prefix}qkv.{name}' in state:
            query, key, value = state.pop(f'{prefix}qkv.{name}').chunk(3)
            state[f'{prefix}q.{name}'], state[f'{prefix}kv.{name}'] = query, torch.cat([key, value])
    _drop_reduction(state, prefix)


def replace_in_stages(
    model: nn.Module, stages: Sequence[int] | None, make: Callable[..., nn.Module], **options: Any
) -> list[Place]:
    """Replaces the attention of the chosen stages by `make`'s; returns the places of the others.

    Raises:
        ValueError: there is no such stage.
    """
    count = len(model.stages) if hasattr(model, 'stages') else 0  # type: ignore[arg-type]
    wanted = tuple(range(count - 1)) if stages is None else tuple(stages)
    if any(not 0 <= stage < count for stage in wanted):
        raise ValueError(f'stages must be numbers from 0 to {count - 1}, got {stages=}')
    others = []
    for place in attentions(model):
        if count and int(place.path.split('.')[1]) not in wanted:
            others.append(place)
        else:
            replace_attention(place, take_over(place.module, make, **options))
    return others


def take_over(attention: nn.Module, make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A layer of another kind with the weights of an attention, as far as it has their like."""
    proj: Any = attention.proj
    heads: Any = attention.num_heads
    weight = proj.weight
    if make is SoftmaxAttention:
        options = {'head_dim': proj.in_features // heads}
    else:
        options = {**options, 'num_heads': heads}
    layer = make(dim=proj.out_features, bias=True, **options).to(weight.device, weight.dtype)
    state = {key: value.detach().clone() for key, value in attention.state_dict().items()}
    for module_path, module in layer.named_modules():
        if hasattr(module, 'resample'):
            module.resample(state, f'{module_path}.' if module_path else '')
    for key, value in layer.state_dict().items():
        if key.endswith('bias') and key not in state:  # projections without a bias
            state[key] = torch.zeros_like(value)
    layer.load_state_dict(state)
    return layer


def _drop_reduction(state: dict[str, Tensor], prefix: str) -> None:
    for key in [key for key in state if key.startswith((f'{prefix}sr.', f'{prefix}norm.'))]:
        del state[key]
