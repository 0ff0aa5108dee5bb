"""Self-attention between the tokens of a plain backbone, with the published options for training and quantisation.

out[i] = sum over j of p[i, j] v[j], p = softmax_j(scale q[i] . k[j] + bias[i, j]), per head. Options change p, the set
of j, or out:

- clipped softmax and gates, Quantizable Transformers, arXiv 2306.12929: heads can attend to nothing without the
  outliers that spoil int8;
- keys dropped at random while training, The Information Pathways Hypothesis, arXiv 2306.01705;
- windows, ViTDet, arXiv 2203.16527, for large images.
"""

# B batch, N tokens, P of them prefix tokens, C channels, H W size of the grid, h heads, d head width, M keys kept
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear, window_attention
from ...kernels.dispatch import inferring
from .linear import Linear
from .lookup import choose, nearest


class ClippedSoftmax(nn.Module):
    """clip((zeta - gamma) softmax(x) + gamma, 0, 1) over the last dimension: exact zeros at finite logits.

    Args:
        gamma: not above 0; 0 and zeta = 1 give softmax.
        zeta: not below 1.
        alpha: if given, gamma is -alpha / (number of keys), which fits any number of keys; the paper takes 2 to 4.
    """

    def __init__(self, gamma: float = -0.003, zeta: float = 1.0, alpha: float | None = None):
        super().__init__()
        if gamma > 0 or zeta < 1 or (alpha is not None and alpha < 0):
            raise ValueError(f'gamma must be <= 0, zeta >= 1 and alpha >= 0, got {gamma=}, {zeta=}, {alpha=}')
        self.gamma, self.zeta, self.alpha = gamma, zeta, alpha

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma if self.alpha is None else -self.alpha / x.shape[-1]
        return (x.softmax(-1) * (self.zeta - gamma) + gamma).clamp(0, 1)

    def extra_repr(self) -> str:
        return f'gamma={self.gamma}, zeta={self.zeta}, alpha={self.alpha}'


class LinearGate(nn.Module):
    """A gate from 0 to 1 per token and head, from the head's slice of the input; (B, N, C) -> (B, N, h, 1)."""

    def __init__(self, dim: int, num_heads: int, hidden: int | None = None, start: float = 0.5):
        super().__init__()
        width = dim // num_heads
        self.hidden = nn.Parameter(torch.empty(num_heads, hidden, width)) if hidden else None
        self.hidden_bias = nn.Parameter(torch.zeros(num_heads, hidden)) if hidden else None
        self.weight = nn.Parameter(torch.empty(num_heads, hidden or width))
        self.bias = nn.Parameter(torch.full((num_heads,), torch.logit(torch.tensor(start)).item()))
        for weight in (self.hidden, self.weight):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (len(self.weight), -1))
        if self.hidden is not None and self.hidden_bias is not None:
            x = F.relu(torch.einsum('bnhd,hkd->bnhk', x, self.hidden) + self.hidden_bias)
        return torch.sigmoid((x * self.weight).sum(-1, keepdim=True) + self.bias[:, None])


class AllHeadsGate(nn.Linear):
    """A gate from 0 to 1 per token and head, from all channels of the input; (B, N, C) -> (B, N, h, 1)."""

    def __init__(self, dim: int, num_heads: int, start: float = 0.5):
        super().__init__(dim, num_heads)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.constant_(self.bias, torch.logit(torch.tensor(start)).item())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))[..., None]


def _mlp_gate(dim: int, num_heads: int) -> nn.Module:
    return LinearGate(dim, num_heads, hidden=4)


GATES: dict[str, Callable[[int, int], nn.Module]] = {
    'linear': LinearGate,
    'mlp': _mlp_gate,
    'all_heads': AllHeadsGate,
}


class HeadSplit(nn.Module):
    """Queries, keys and values of tokens (B, N, C), each (B, h, N, d), all from one layer `qkv`."""

    qkv: Any  # nn.Linear, or what took its place
    num_heads: int

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = split_heads(self.qkv(x), self.num_heads, 3)
        return query, key, value

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.qkv, nn.Linear):
            return self.split(x)[:2]
        query, key = split_heads(linear_rows(self.qkv, x, 0, 2), self.num_heads, 2)
        return query, key

    def value(self, x: Tensor) -> Tensor:
        if not isinstance(self.qkv, nn.Linear):
            return self.split(x)[2]
        return split_heads(linear_rows(self.qkv, x, 2, 3), self.num_heads, 1)[0]


class TokenAttention(HeadSplit):
    """The formula above on (B, N, C), the first P tokens being prefix tokens.

    Args:
        dim: channels.
        num_heads: divides dim.
        prefix: P.
        qkv_bias: learn a bias of queries, keys and values.
        scale: of the products; (dim / num_heads) ** -0.5 if None.
        window_size: side of the windows that patches attend within; None for all tokens. Prefix tokens stay out of
            windows: they attend to all tokens, and patches meet them in blocks without windows alone.
        clip: arguments of `ClippedSoftmax`, as dict(gamma=-0.003) or dict(alpha=4.0); None for softmax.
        gate: 'linear', 'mlp' or 'all_heads' multiplies each head's output by a gate of the token; None has none.
        key_drop: share of the patches' keys that are left out while training, drawn anew for each image in each call;
            those of prefix tokens stay.
        attn_drop: probability of dropping a single weight p while training.
    """

    last_linear = 'proj'

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        prefix: int = 0,
        qkv_bias: bool = True,
        scale: float | None = None,
        window_size: int | None = None,
        clip: Mapping[str, float] | None = None,
        gate: str | None = None,
        key_drop: float = 0.0,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads must divide dim, got {num_heads=}, {dim=}')
        if not 0 <= key_drop < 1:
            raise ValueError(f'key_drop must be from 0 to below 1, got {key_drop=}')
        if window_size is not None and window_size < 1:
            raise ValueError(f'window_size must be positive, got {window_size=}')
        if window_size is not None and (clip is not None or key_drop):
            raise ValueError(f'windows take neither clip nor key_drop, got {window_size=}, {clip=}, {key_drop=}')
        if not 0 <= attn_drop < 1 or (attn_drop and window_size is not None):
            raise ValueError(f'attn_drop must be from 0 to below 1, and 0 in windows, got {attn_drop=}, {window_size=}')
        self.num_heads, self.prefix, self.key_drop, self.window_size = num_heads, prefix, key_drop, window_size
        self.attn_drop = attn_drop
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.softmax = None if clip is None else ClippedSoftmax(**clip)
        self.gate = None if gate is None else choose('gate', gate, GATES)(dim, num_heads)
        self.proj = Linear(dim, dim)
        # what fold_norm may fold a norm into: a gate reads the normalised input too
        self.first_linears: tuple[str, ...] = ('qkv',) if gate is None else ()

    def forward(
        self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None, outputs: int | None = None
    ) -> Tensor:
        """(B, N, C) -> (B, N, C), or (B, outputs, C).

        Args:
            grid: (H, W) with N = P + H W; read by windows alone.
            bias: added to the scaled products, of a shape that broadcasts to (B, h, N, N): for merged tokens the
                logarithm of their sizes, (B, 1, 1, N).
            outputs: of the first tokens alone, without windows; None computes all.
        """
        if self.window_size is not None:
            return self.join(self._in_windows(self.qkv(x), grid, bias), x)
        query, key, value = self.split(x)
        if outputs is not None:
            query, x = query[:, :, :outputs], x[:, :outputs]
        return self.join(self.attend(query, key, value, bias), x)

    # ---- the steps, for what reduces tokens between them: see `backbones.reduction.interface`

    @property
    def any_tokens(self) -> bool:
        """Whether tokens may be fewer and in another order than the grid has them."""
        return self.window_size is None

    def weigh(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        """p, (B, h, N, M)."""
        logits = biased(scaled_products(query, key, self.scale), bias)
        return logits.softmax(-1) if self.softmax is None else self.softmax(logits)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """p v, (B, h, N, d), without p in memory where that is possible."""
        if self.training and self.key_drop:
            key, value, bias = self._drop_keys(key, value, bias)
        return self._attend(query, key, value, bias)

    def join(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, N, C) from the heads' outputs (B, h, N, d); x is what the queries were computed from."""
        out = out.transpose(1, 2)
        if self.gate is not None:
            out = out * self.gate(x)
        return self.proj(out.flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        drop = self.attn_drop if self.training else 0.0
        if self.softmax is None:
            return F.scaled_dot_product_attention(query, key, value, bias, dropout_p=drop, scale=self.scale)
        return F.dropout(self.weigh(query, key, bias), drop, self.training) @ value

    def _in_windows(self, qkv: Tensor, grid: tuple[int, int], bias: Tensor | None) -> Tensor:
        """(B, h, N, d)."""
        if bias is not None:
            raise ValueError('windows take no bias: merged tokens lie on no grid')
        patches = window_attention(
            qkv[:, self.prefix :].unflatten(1, grid), self.window_size or 1, heads=self.num_heads, scale=self.scale
        )
        out = patches.flatten(1, 2).unflatten(2, (self.num_heads, -1))
        if self.prefix:
            query, key, value = split_heads(qkv, self.num_heads, 3)
            ahead = self._attend(query[:, :, : self.prefix], key, value, None)
            out = torch.cat((ahead.transpose(1, 2), out), 1)
        return out.transpose(1, 2)

    def _drop_keys(self, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Those of the prefix tokens and of M - P patches, each image's own draw."""
        B, heads, N, width = key.shape
        kept = max(1, round((N - self.prefix) * (1 - self.key_drop)))
        chosen = torch.rand(B, N - self.prefix, device=key.device).argsort(1)[:, :kept] + self.prefix
        ahead = torch.arange(self.prefix, device=key.device).expand(B, -1)
        chosen = torch.cat((ahead, chosen), 1)  # (B, M)
        index = chosen[:, None, :, None].expand(-1, heads, -1, width)
        if bias is not None:
            bias = bias.expand(B, -1, -1, N)
            bias = bias.gather(3, chosen[:, None, None, :].expand(-1, bias.shape[1], bias.shape[2], -1))
        return key.gather(2, index), value.gather(2, index), bias

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, window_size={self.window_size}, key_drop={self.key_drop}'


def linear_rows(qkv: nn.Linear, x: Tensor, first: int, last: int) -> Tensor:
    """Thirds `first` to `last` of what a linear layer for queries, keys and values gives."""
    width = qkv.out_features // 3
    bias = None if qkv.bias is None else qkv.bias[first * width : last * width]
    return linear(x, qkv.weight[first * width : last * width], bias)


def scaled_products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale q[i] . k[j], (B, h, N, M), of queries (B, h, N, d) and keys (B, h, M, d)."""
    if not inferring():
        return (query * scale) @ key.transpose(-2, -1)
    # `@` would copy the keys a channel at a time, as they lie apart in memory for every head: 3.4 ms for 2.4 with 16
    # images of 117 tokens
    unread = query.new_empty(1, 1, 1)
    out = torch.baddbmm(unread, query.flatten(0, 1), key.flatten(0, 1).mT, beta=0, alpha=scale)
    return out.unflatten(0, query.shape[:2])


def biased(logits: Tensor, bias: Tensor | None) -> Tensor:
    """logits + bias; in the logits' own memory where nothing is differentiated."""
    if bias is None:
        return logits
    in_place = inferring() and bias.dtype == logits.dtype
    return logits.add_(bias) if in_place else logits + bias


def split_heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """(B, N, parts h d) -> that many (B, h, N, d)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


# token mixers of plain backbones by name: modules (x, grid) -> (B, N, C), made with dim, num_heads, prefix, qkv_bias
# and window_size where they know them, and with options of their own
TOKEN_MIXERS: dict[str, Callable[..., nn.Module]] = {'attention': TokenAttention}


def build_token_mixer(spec: str | Mapping[str, Any], **context: Any) -> nn.Module:
    """A token mixer from its name, or from dict(name=..., option=...); an option stated there wins over `context`.

    Raises:
        ValueError: no mixer has this name.  TypeError: it has no such option.
    """
    options = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else options.pop('name', 'attention')
    make = choose('token_mixer', name, TOKEN_MIXERS)
    accepted = inspect.signature(make).parameters
    for option in options:
        if option not in accepted:
            raise TypeError(
                f'token mixer {name!r} has no option {option!r}{nearest(option, accepted)}; '
                f'it takes {", ".join(accepted)}'
            )
    return make(**{key: value for key, value in {**context, **options}.items() if key in accepted})
