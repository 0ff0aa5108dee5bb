"""ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer, arXiv 2306.06446.

Written from the paper and the facts of the authors' code, https://github.com/GATECH-EIC/ShiftAddViT (Apache-2.0; no
weights were published). Attention is linear in binary codes c of queries and keys, so that its products are sums:

    out_i = u_i / |u_i| + conv(v)_i,    u_i = v_i / 2 + (1 / pi) c_i (sum_j c_j v_j^T)

per head, with a depthwise convolution over 9 tokens in row order; there is no denominator and no scale. Linear layers
of attention and of MLPs become shifts, or mixtures of both (`mixture`). Differs: noise in gates is drawn in training
alone; codes by a mean can use that of each image instead of the batch's; the sparse softmax term needs separate queries
and keys, so it is there for codes by a mean alone.
"""

# B batch, H W size of the map, N tokens, C channels, h heads, d head width
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.precision import full_precision
from ..layers.linear import Linear
from ..layers.lookup import choose
from ..layers.token_attention import split_heads
from .hashing import KernelHash, normalised
from .mixture import MixtureLinear
from .replace import attentions, refuse, replace_attention, replace_linears
from .softmax import (
    SOURCES,
    SoftmaxAttention,
    replace_in_stages,
    share_projection,
    split_projection,
    take_over,
)
from .sums import shift_layer

LAYERS = ('dense', 'shift', 'mixture')


class AdditiveAttention(nn.Module):
    """The formula above on (B, H, W, C) or (B, N, C), with codes 0 or 1 that are hash functions of one projection.

    Args:
        dim: channels.
        num_heads: divides dim.
        bias: learn biases of the projections.
        hash: options of `KernelHash`.
    """

    def __init__(self, *, dim: int, num_heads: int, bias: bool = True, **hash: Any):
        super().__init__()
        self.num_heads = num_heads
        # the authors' key of the hash functions is qk_quant.ksh
        self.qk_quant = nn.ModuleDict({'ksh': KernelHash(num_heads, dim // num_heads, codes='step', **hash)})
        self.to_qk = Linear(dim, dim, bias=bias)
        self.to_v = Linear(dim, dim, bias=bias)
        self.proj = Linear(dim, dim)
        self.dconv = token_conv(num_heads)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        tokens = x.flatten(1, -2)
        qk, value = (
            layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.to_qk, self.to_v)
        )
        codes = self.qk_quant['ksh'](normalised(qk))
        out = additive_attention(codes, codes, value) + self.dconv(value)
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Projections of the attention that this one replaced, in place; the convolution starts as it is here."""
        share_projection(state, prefix)
        state.setdefault(f'{prefix}dconv.weight', self.dconv.weight.detach())

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}'


class MeanAttention(nn.Module):
    """The same with codes of queries and of keys: 1 where an entry is above the mean of all.

    Args:
        dim: channels.
        num_heads: divides dim.
        bias: learn a bias of queries, keys and values.
        over_batch: the mean is that of the whole batch, as in the authors' code, instead of each image's.
        sparse: add softmax attention, of what it has above 0.02.
    """

    def __init__(self, *, dim: int, num_heads: int, bias: bool = True, over_batch: bool = False, sparse: bool = False):
        super().__init__()
        self.num_heads, self.over_batch, self.sparse = num_heads, over_batch, sparse
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.proj = Linear(dim, dim)
        self.dconv = token_conv(num_heads)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        query, key, value = split_heads(self.qkv(x.flatten(1, -2)), self.num_heads, 3)
        extra = None
        if self.sparse:
            attention = ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(-1)
            extra = ((attention > 0.02) * attention) @ value
        query, key = self.code(normalised(query)), self.code(normalised(key))
        out = additive_attention(query, key, value, extra) + self.dconv(value)
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)

    def code(self, x: Tensor) -> Tensor:
        """1 where an entry is above the mean, else 0; the gradient passes where 0 <= x <= 1."""
        mean = x.mean() if self.over_batch else x.mean((1, 2, 3), keepdim=True)
        above = (x > mean).to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return above
        within = x.clamp(0, 1)
        return above + (within - within.detach())

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Projections of the attention that this one replaced, in place; the convolution starts as it is here."""
        SoftmaxAttention.resample(self, state, prefix)  # type: ignore[arg-type]
        state.setdefault(f'{prefix}dconv.weight', self.dconv.weight.detach())

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, over_batch={self.over_batch}, sparse={self.sparse}'


def additive_attention(query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None = None) -> Tensor:
    """u / |u| for codes (..., N, b) and values (..., N, d), in float32 at least; `extra` is added to u."""
    with full_precision(value):
        wide = torch.promote_types(value.dtype, torch.float32)
        v = value.to(wide)
        u = 0.5 * v + (1 / math.pi) * (query.to(wide) @ (key.to(wide).transpose(-2, -1) @ v))
        return normalised(u if extra is None else u + extra).to(value.dtype)


def token_conv(num_heads: int) -> nn.Conv2d:
    """A depthwise convolution over 9 tokens of (B, h, N, d), one filter per head."""
    return nn.Conv2d(num_heads, num_heads, (9, 1), padding=(4, 0), groups=num_heads, bias=False)


class LinearAttention(nn.Module):
    """Softmax attention without its softmax, the authors' baseline: out_i = d^(-1/2) q_i (sum_j k_j v_j^T).

    On (B, H, W, C) or (B, N, C), all numbers floating point. There is no denominator: outputs grow with N.

    Args:
        dim: channels.
        num_heads: divides dim.
        bias: learn biases of queries, and of keys and values.
    """

    def __init__(self, *, dim: int, num_heads: int, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=bias)
        self.kv = Linear(dim, 2 * dim, bias=bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        tokens = x.flatten(1, -2)
        query = self.q(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key, value = split_heads(self.kv(tokens), self.num_heads, 2)
        with full_precision(value):  # the sum over a large map leaves float16's range
            wide = torch.promote_types(value.dtype, torch.float32)
            summed = key.to(wide).transpose(-2, -1) @ value.to(wide)
            out = (query.to(wide) @ (summed * value.shape[-1] ** -0.5)).to(value.dtype)
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Projections of the attention that this one replaced, in place."""
        split_projection(state, prefix)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}'


ATTENTION: dict[str, Callable[..., nn.Module]] = {
    'hash': AdditiveAttention,
    'mean': MeanAttention,
    'batch_mean': partial(MeanAttention, over_batch=True),
    'sparse': partial(MeanAttention, sparse=True),
    'linear': LinearAttention,
}


def shiftadd(
    model: nn.Module,
    *,
    attention: str | None = 'hash',
    stages: Sequence[int] | None = None,
    attention_layers: str = 'shift',
    mlp_layers: str = 'mixture',
    gate: str = 'naive',
    latencies: Sequence[float] = (6.0, 4.0),
    form: str = 'ps',
    weight_bits: int = 5,
    bits: int = 16,
    anchors: int = 25,
    topk: int = 10,
    iterations: int = 100,
    lr: float = 5e-4,
) -> None:
    """Re-parameterizes a trained model in place.

    Args:
        attention: how queries and keys become codes: 'hash' learns hash functions, 'mean' compares with the mean of
            each image, 'batch_mean' with that of the batch, 'sparse' is 'mean' plus a sparse softmax; 'linear' has no
            codes: the authors' baseline, of multiplications in linear time; None keeps the model's own attention.
        stages: of a hierarchical model, those whose attention is replaced; the other ones get softmax attention at full
            resolution. None for all but the last, and for all blocks of a plain model.
        attention_layers, mlp_layers: 'dense' keeps linear layers, 'shift' makes their weights powers of two or sums of
            two, 'mixture' has both, and a gate. In stages that keep a softmax, 'shift' changes the last layer of
            attention alone, and 'mixture' none, as in the authors' code.
        gate, latencies: of mixtures, see `MixtureLinear`.
        form, weight_bits: of shifts: 'ps' or 'q' of `ShiftLinear`, powers of two, 'sp2' or 'apot' of `ShiftSumLinear`,
            sums of two of them.
        bits, anchors, topk, iterations, lr: of the hash functions, see `KernelHash`.

    Raises:
        ValueError: an argument is not allowed, or the model has no attention that can be replaced.
    """
    for name, value in (('attention_layers', attention_layers), ('mlp_layers', mlp_layers)):
        choose(name, value, {layer: layer for layer in LAYERS})
    shift: dict[str, Any] = dict(form=form, weight_bits=weight_bits)
    makers: dict[str, Callable[[nn.Linear], nn.Module]] = {
        'shift': partial(shift_layer, **shift),
        'mixture': partial(MixtureLinear, gate=gate, latencies=latencies, **shift),
    }
    for make in makers.values():
        make(Linear(1, 1))  # arguments are checked before anything is changed
    if attention is not None:
        make_attention = choose('attention', attention, ATTENTION)
        refuse('shiftadd', model, SOURCES)
        hash = dict(bits=bits, anchors=anchors, topk=topk, iterations=iterations, lr=lr)
        for place in replace_in_stages(model, stages, make_attention, **(hash if attention == 'hash' else {})):
            replace_attention(place, take_over(place.module, SoftmaxAttention))
    if attention_layers != 'dense':
        for place in attentions(model):
            linear = not isinstance(place.module, SoftmaxAttention)
            names = ('to_qk', 'to_v', 'qkv', 'q', 'kv', 'proj') if linear else ('proj',)
            if linear or attention_layers == 'shift':
                replace_linears(place.module, makers[attention_layers], names)
    if mlp_layers != 'dense':
        for path, module in list(model.named_modules()):
            if path.rsplit('.', 1)[-1] == 'mlp':
                replace_linears(module, makers[mlp_layers])
