"""Attention of binary codes: by a threshold instead of softmax, or by hashed codes in linear time.

`hamming_attention`: with the signs Q, K, V in {-1, 0, 1} of queries, keys and values, per head,

    logit[i, j] = scale * Q[i] . K[j] + bias[i, j]                    (Q . K = d - 2 hamming(Q, K), d the head's width)
    A[i, j] = 1 if softmax_j(logit[i])[j] >= threshold * max of that row, else 0
            = 1 if logit[i, j] >= max_j logit[i, j] + ln(threshold), else 0
    out[i] = sum over j of A[i, j] * V[j]                             (whole numbers)

The second form of A needs no exponential: that is what is computed. threshold=None: A = 1 where logit > 0, the baseline
without softmax. Layout: query (..., N, d), key, value (..., M, d), any leading axes (batch, windows, heads); bias
broadcasts to (..., N, M), -inf or a large negative number masks; out (..., N, d).
Source: BiViT, arXiv 2211.07091 (threshold 0.25).

`hashed_attention`: codes c, k in {-1, 1} of n bits stand for queries and keys, c . k + n + 1 for their similarity,

    out[i] = (c[i] . sum_j (k[j] v[j]^T) + (n + 1) u[i]) / (c[i] . sum_j k[j] + N (n + 1)),   u[i] = sum_j v[j]

whose sums over j are taken once: time grows linearly with N, and products with a code are additions and subtractions.
The authors' code, which their weights are trained with, has u[i] = v[i]; that is the default here.
Source: EcoFormer, arXiv 2209.09004.

On a GPU the first runs in Triton with the signs as half-precision operands of tensor cores: popcount of a word takes
two cycles of a quarter-rate unit for 32 products, tensor cores are faster at head widths of 32 and more. On a CPU both
are matrix products.
"""

import math

import torch
from torch import Tensor

from .dispatch import NOT_WRITTEN, refuse_triton, select
from .precision import full_precision


def hamming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    threshold: float | None = 0.25,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Binary attention: signs of queries, keys and values, a 0/1 map by a threshold. For inference.

    Args:
        query: (..., N, d) floating point; of all three the signs alone matter.
        key, value: (..., M, d), with the same leading axes.
        scale: of the products, positive; d ** -0.5 if None.
        threshold: share of a row's largest softmax value from which on a key counts, above 0 and at most 1; None: keys
            with a positive logit count.
        bias: added to the logits; broadcasts to (..., N, M).
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        (..., N, d) whole numbers of the type of query.

    Raises:
        ValueError: a shape or number does not fit, or the backend asked for cannot take the call.
    """
    _check(query, key, value, bias)
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f'threshold must be above 0 and at most 1, or None, got {threshold=}')
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f'scale must be positive, got {scale=}')
    refusals = {'triton': can_run_triton(query, key, value, bias), 'torch': None}
    if select('hamming_attention', backend, refusals) == 'triton':
        from .triton_hamming import hamming_attention_triton  # Triton is imported where it is used

        return hamming_attention_triton(query, key, value, scale=scale, threshold=threshold, bias=bias)
    return hamming_attention_reference(query, key, value, scale=scale, threshold=threshold, bias=bias)


def hamming_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, threshold: float | None, bias: Tensor | None
) -> Tensor:
    """The definition in plain PyTorch; float32 at least, since half precision rounds whole numbers above 2048."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    with full_precision(query):
        q, k, v = (t.sign().float() if half else t.sign() for t in (query, key, value))
        logits = scale * (q @ k.transpose(-1, -2))
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        lowest = 0.0 if threshold is None else logits.amax(-1, keepdim=True) + math.log(threshold)
        chosen = logits > lowest if threshold is None else logits >= lowest
        return (chosen.to(v.dtype) @ v).to(query.dtype)


def hashed_attention(
    query: Tensor, key: Tensor, value: Tensor, *, own_value: bool = True, backend: str | None = None
) -> Tensor:
    """Attention of hashed codes in linear time; differentiable.

    Args:
        query: (B, h, N, n) codes, -1 or 1 (0 where a hash is undecided).
        key: (B, h, N, n).
        value: (B, h, N, d) floating point.
        own_value: the authors' numerator, which adds (n + 1) times the token's own value; False: times the sum of all.
        backend: None chooses; 'torch' insists, there is no Triton kernel.

    Returns:
        (B, h, N, d) of the type of value.

    Raises:
        ValueError: a shape does not fit, or the backend asked for cannot take the call.
    """
    if query.ndim != 4 or query.shape != key.shape or value.ndim != 4 or value.shape[:3] != query.shape[:3]:
        raise ValueError(
            'query and key must be (B, h, N, n) and value (B, h, N, d), got '
            f'{tuple(query.shape)=}, {tuple(key.shape)=}, {tuple(value.shape)=}'
        )
    select('hashed_attention', backend, {'triton': NOT_WRITTEN, 'torch': None})
    N, bits = query.shape[-2:]
    with full_precision(value):
        codes, keys, v = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (query, key, value))
        keys = keys.transpose(-1, -2)
        total = codes @ keys.sum(-1, keepdim=True) + N * (bits + 1)
        share = v if own_value else v.sum(-2, keepdim=True)
        return ((codes @ (keys @ v) + (bits + 1) * share) / total).to(value.dtype)


def can_run_triton(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> str | None:
    """Why Triton cannot take this call."""
    if any(t.requires_grad for t in (query, key, value)) and torch.is_grad_enabled():
        return 'an input asks for a gradient, and the kernel is for inference alone'
    tensors = {'query': query, 'key': key, 'value': value, 'bias': bias}
    return refuse_triton(tensors, width=query.shape[-1])


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    if query.ndim < 2 or key.ndim < 2 or value.shape != key.shape:
        raise ValueError(
            'query must be (..., N, d), key and value (..., M, d), got '
            f'{tuple(query.shape)=}, {tuple(key.shape)=}, {tuple(value.shape)=}'
        )
    if query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f'query and key must agree but for N and M, got {tuple(query.shape)=}, {tuple(key.shape)=}')
    wanted = (*query.shape[:-1], key.shape[-2])
    if bias is not None and (
        bias.ndim > len(wanted) or any(have not in (1, need) for have, need in zip(bias.shape[::-1], wanted[::-1]))
    ):
        raise ValueError(f'bias must broadcast to {wanted}, got {tuple(bias.shape)=}')
