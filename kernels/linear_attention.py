"""Attention with ReLU instead of softmax, at a cost that grows linearly with the number of positions.

For each head, with Q = max(q, 0), K = max(k, 0), over all positions j of the map:

    out[i] = sum over j of (Q[i] . K[j]) * v[j]  /  (sum over j of (Q[i] . K[j]) + eps)

The sums over j of K[j] v[j] and of K[j] are taken first, so nothing of size N x N is made; on maps of at most d
positions that product is the smaller one, and is made. There is no scale and no position bias.

Layout: qkv (B, H, W, 3C), channels ordered (head, q | k | v, d); out (B, H, W, C), ordered (head, d). Any H, W >= 1.
Computed in float32 at least, whatever autocast says: the sums over a large map leave float16's range.
Source: EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction, arXiv 2205.14756.
"""

import torch
from torch import Tensor

from .dispatch import NOT_WRITTEN, select
from .precision import full_precision


def relu_linear_attention(qkv: Tensor, *, heads: int, eps: float = 1e-15, backend: str | None = None) -> Tensor:
    """ReLU linear attention between all positions of a map.

    Args:
        qkv: (B, H, W, 3C) floating point, channels ordered (head, q | k | v, d).
        heads: divides C.
        eps: added to the sum of the products.
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        (B, H, W, C) of the type of qkv.

    Raises:
        ValueError: qkv has not four dimensions, heads does not divide its channels, or the backend cannot take it.
    """
    if qkv.ndim != 4:
        raise ValueError(f'qkv must be (B, H, W, 3C), got {tuple(qkv.shape)=}')
    if heads < 1 or qkv.shape[-1] % (3 * heads):
        raise ValueError(f'heads must divide the channels of q, k and v, got {heads=}, {tuple(qkv.shape)=}')
    select('relu_linear_attention', backend, {'triton': NOT_WRITTEN, 'torch': None})
    return relu_linear_attention_reference(qkv, heads=heads, eps=eps)


def relu_linear_attention_reference(qkv: Tensor, *, heads: int, eps: float) -> Tensor:
    """The definition in plain PyTorch."""
    B, H, W, C3 = qkv.shape
    tokens, width = H * W, C3 // (3 * heads)
    with full_precision(qkv):
        x = qkv.float() if qkv.dtype in (torch.float16, torch.bfloat16) else qkv
        x = x.reshape(B, tokens, heads, 3, width).permute(3, 0, 2, 1, 4)  # (3, B, heads, N, d)
        query, key = x[:2].relu()
        value = x[2]
        if isinstance(tokens, int) and tokens <= width:  # symbolic sizes take the form that fits all
            products = query @ key.transpose(-1, -2)
            out = (products / (products.sum(-1, keepdim=True) + eps)) @ value
        else:
            keys = key.transpose(-1, -2)
            total = query @ keys.sum(-1, keepdim=True)
            out = (query @ (keys @ value)) / (total + eps)
        return out.transpose(1, 2).reshape(B, H, W, C3 // 3).to(qkv.dtype)
