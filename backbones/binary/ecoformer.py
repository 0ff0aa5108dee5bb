"""EcoFormer: Energy-Saving Attention with Linear Complexity, arXiv 2209.09004.

Written from the paper and the facts of the authors' code, https://github.com/ziplab/EcoFormer (Apache-2.0). Queries and
keys are one projection and become binary codes c of b bits (`hashing`), values stay floating point:

    out_i = (c_i . sum_j c_j v_j^T + (b + 1) v_i) / (c_i . sum_j c_j + N (b + 1))

so the products of codes are sums and differences, and nothing of size N x N is made. The weights that this stands for
are c_i . c_j + b + 1, all positive. Their numerator has (b + 1) sum_j v_j, the authors' code (b + 1) v_i: their
published weights were trained with that, so it is the default; `exact_sum=True` corrects it. Attention is at full
resolution; the last stage keeps a softmax. Training has two stages: the model with softmax attention at full resolution
(`sr_ratios=1`), then this one from its weights. Differs: where a map has fewer tokens than there are anchors, those of
more images are taken, and topk is at most the number of tokens; the authors' code stops there.
"""

# B batch, H W size of the map, N tokens, C channels, h heads, d head width, b bits
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...kernels import hashed_attention
from ..layers.linear import Linear
from .hashing import KernelHash, normalised
from .replace import refuse, replace_attention
from .softmax import SOURCES, SoftmaxAttention, replace_in_stages, share_projection, take_over


class EcoFormerAttention(nn.Module):
    """Attention of binary codes between all positions, on (B, H, W, C) or (B, N, C).

    Args:
        dim: channels.
        num_heads: divides dim.
        bias: learn biases of the projections of queries and keys, and of values.
        exact_sum: the corrected numerator.
        hash: options of `KernelHash`.
    """

    def __init__(self, *, dim: int, num_heads: int, bias: bool = True, exact_sum: bool = False, **hash: Any):
        super().__init__()
        self.num_heads, self.exact_sum = num_heads, exact_sum
        # the authors' key of the hash functions is fast_attention.ksh
        self.fast_attention = nn.ModuleDict({'ksh': KernelHash(num_heads, dim // num_heads, **hash)})
        self.to_qk = Linear(dim, dim, bias=bias)
        self.to_v = Linear(dim, dim, bias=bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        tokens = x.flatten(1, -2)
        qk, value = (layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in self.projections)
        codes = self.fast_attention['ksh'](normalised(qk))
        out = hashed_attention(codes, codes, value, own_value=not self.exact_sum)
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)

    @property
    def projections(self) -> tuple[nn.Module, nn.Module]:
        return self.to_qk, self.to_v

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Projections of the attention that this one replaced, in place."""
        share_projection(state, prefix)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, exact_sum={self.exact_sum}'


def ecoformer(
    model: nn.Module,
    *,
    stages: Sequence[int] | None = None,
    bits: int = 16,
    anchors: int = 25,
    topk: int = 10,
    iterations: int = 100,
    lr: float = 5e-4,
    exact_sum: bool = False,
) -> None:
    """Gives a model attention of learned binary codes, in place.

    Args:
        stages: of a hierarchical model, those whose attention is replaced; the other ones get softmax attention at full
            resolution. None for all but the last, and for all blocks of a plain model.
        bits, anchors, topk, iterations, lr: of the hash functions, see `KernelHash`.
        exact_sum: the numerator as the mathematics have it instead of as the published weights have.

    Raises:
        ValueError: the model has no attention that can be replaced, or no such stage.
    """
    refuse('ecoformer', model, SOURCES)
    hash = dict(bits=bits, anchors=anchors, topk=topk, iterations=iterations, lr=lr)
    for place in replace_in_stages(model, stages, EcoFormerAttention, exact_sum=exact_sum, **hash):
        replace_attention(place, take_over(place.module, SoftmaxAttention))
