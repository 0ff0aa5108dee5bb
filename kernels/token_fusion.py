"""Multi-criteria token fusion: which tokens are alike, of little information and small, and who joins whom.

Tokens at even positions are A, at odd ones B. With m the metric divided by its norm, s[j] the attention that token j
receives, averaged over heads and queries, and t[j] its size,

    score[a, b] = ((m[a] . m[b] + 1) / 2) ** (1 / tau_sim)
                  * (i[a] i[b]) ** (1 / tau_info) * (z[a] z[b]) ** (1 / tau_size)
    i[j] = (1 / s[j]) / max over k of (1 / s[k]),        z[j] likewise from t

and a tau of 0 leaves its factor out. Both ways: the r // 2 tokens of A with the highest scores join their best partners
in B; then those of B with the highest scores join their best partners among the tokens of A that are left, and take
with them what joined them. The order afterwards is (A in order of position, B in order of falling best score); one way
only (A, all B). Source: Multi-criteria Token Fusion with One-step-ahead Attention, arXiv 2403.10030.
"""

# B batch, N tokens, C channels
from typing import NamedTuple

import torch
from torch import Tensor

from .token_places import falling, rising


class Fusion(NamedTuple):
    """Where N tokens go, of which M are left.

    Attributes:
        place: (B, N) int64, from 0 to M - 1.
        kept: (B, M) int64, the token that stays at each place.
        moved: (B, N - M) int64, the others.
    """

    place: Tensor
    kept: Tensor
    moved: Tensor

    @property
    def left(self) -> int:
        """M."""
        return self.kept.shape[1]


def fusion_scores(
    metric: Tensor,
    received: Tensor,
    size: Tensor | None,
    *,
    tau_sim: float = 1.0,
    tau_info: float = 20.0,
    tau_size: float = 40.0,
) -> Tensor:
    """The formula above, (B, |A|, |B|).

    Args:
        metric: (B, N, C).
        received: (B, N), the attention that each token receives.
        size: (B, N, 1) or None, which leaves its factor out.
    """
    weight = torch.ones_like(received)  # powers of tokens, not of pairs
    if tau_info:
        weight = weight * _relative(received) ** (1 / tau_info)
    if tau_size and size is not None:
        weight = weight * _relative(size[..., 0]) ** (1 / tau_size)
    pairs = weight[:, ::2, None] * weight[:, None, 1::2]
    if not tau_sim:
        return pairs
    unit = metric / metric.norm(dim=-1, keepdim=True)
    cosine = unit[:, ::2] @ unit[:, 1::2].mT
    if tau_sim != 1:
        return ((cosine + 1) / 2) ** (1 / tau_sim) * pairs
    pairs = pairs / 2
    return torch.addcmul(pairs, cosine, pairs)


def fuse_by_scores(scores: Tensor, r: int, *, class_token: bool, both_ways: bool = True) -> Fusion:
    """Who joins whom.

    Args:
        scores: (B, |A|, |B|).
        r: tokens to remove, at most half of those that are not the class token.
        class_token: position 0 holds one, which neither moves nor takes others up. Without it tokens of A that are left
            are in order of falling score.

    Raises:
        ValueError: r is negative, or too large.
    """
    B, in_a, in_b = scores.shape
    most = (in_a + in_b - class_token) // 2
    if not 0 <= r <= most:
        raise ValueError(f'r must be from 0 to {most}, got {r=}')
    first = r // 2 if both_ways else r
    best, partner = scores.max(2)
    if class_token:
        best = torch.cat((best.new_full((B, 1), float('-inf')), best[:, 1:]), 1)
    order = falling(best)
    stay, source = order[:, first:], order[:, :first]
    if class_token:
        stay = rising(stay)
    kept = in_a - first
    places = torch.arange(max(kept, in_b), device=scores.device).expand(B, -1)
    place_a = torch.zeros_like(partner).scatter(1, stay, places[:, :kept])
    if both_ways:
        gone = torch.cat((torch.zeros_like(order[:, :1]), source), 1) if class_token else source
        remaining = scores + torch.zeros_like(best).scatter(1, gone, float('-inf'))[..., None]
        best_b, partner_b = remaining.max(1)
        order_b = falling(best_b)
        second = r - first
        stay_b, moved_b = order_b[:, second:], order_b[:, :second]
        place_b = torch.zeros_like(partner_b).scatter(1, stay_b, kept + places[:, : in_b - second])
        place_b = place_b.scatter(1, moved_b, place_a.gather(1, partner_b.gather(1, moved_b)))
    else:
        place_b = kept + places[:, :in_b]
        stay_b, moved_b = places[:, :in_b], places[:, :0]
    place_a = place_a.scatter(1, source, place_b.gather(1, partner.gather(1, source)))
    pairs = torch.stack((place_a[:, :in_b], place_b), 2).flatten(1)
    return Fusion(
        torch.cat((pairs, place_a[:, in_b:]), 1),
        torch.cat((2 * stay, 2 * stay_b + 1), 1),
        torch.cat((2 * source, 2 * moved_b + 1), 1),
    )


def _relative(values: Tensor) -> Tensor:
    """Inverses over the largest inverse, (B, N)."""
    inverse = 1 / values
    return inverse / inverse.amax(1, keepdim=True)
