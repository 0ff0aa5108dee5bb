"""Merging of similar tokens by bipartite soft matching.

Tokens at even positions are A, at odd ones B. With m the metric divided by its norm, each a in A has its best partner

    b(a) = argmax over b in B of m[a] . m[b],        s(a) = that maximum

and the r tokens of A with the highest s are merged into their partners, weighted by size (how many tokens each stands
for): x[b] = sum of size * x over b and what goes into it / sum of size. The order afterwards is (A that stay, all B);
with a distillation token (class token, distillation token, A that stay, B). A class token, position 0, stays; a
distillation token, position 1, takes no other token. Source: Token Merging, arXiv 2210.09461.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import refuse_triton, select
from .token_places import falling, mean_to_places, rising, sum_to_places, take_places


@dataclass(frozen=True)
class Matching:
    """Which tokens are merged into which.

    Args:
        stay: (B, |A| - r) int64, the tokens that stay, by their number in A.
        source: (B, r) int64, those merged, by their number in A, the most similar first.
        target: (B, r) int64, their partners, by their number in B.
        a, b: (|A|,) and (|B|,) int64, the positions of A and of B.
        tokens: N, how many were matched.
        distill_token: whether the two first tokens come first.
    """

    stay: Tensor
    source: Tensor
    target: Tensor
    a: Tensor
    b: Tensor
    tokens: int
    distill_token: bool = False

    def kept(self) -> Tensor:
        """(B, N - r) int64: the token that stays at each place after merging."""
        stay, b = self.a[self.stay], self.b.expand(self.stay.shape[0], -1)
        if self.distill_token:
            return torch.cat((stay[:, :1], b[:, :1], stay[:, 1:], b[:, 1:]), 1)
        return torch.cat((stay, b), 1)

    def places(self) -> Tensor:
        """(B, N) int64: the position after merging of what each token became part of; dropped ones are left out."""
        if not self.source.shape[1]:
            return torch.arange(self.tokens, device=self.b.device).expand(self.stay.shape[0], -1)
        B, kept = self.stay.shape
        partner = torch.arange(kept, kept + self.b.numel(), device=self.b.device)
        stay = torch.arange(kept, device=self.b.device)
        if self.distill_token:  # the first of B comes second, and what follows it in A one later
            stay = stay + (stay > 0)
            partner = torch.where(partner == kept, 1, partner)
        place = torch.empty(B, self.a.numel() + self.b.numel(), dtype=torch.int64, device=self.b.device)
        place = place.index_copy(1, self.b, partner.expand(B, -1))
        place = place.scatter(1, self.a[self.stay], stay.expand(B, -1))
        return place.scatter(1, self.a[self.source], partner[self.target])


def match_tokens(
    metric: Tensor, r: int, *, class_token: bool = False, distill_token: bool = False, backend: str | None = None
) -> Matching:
    """Finds the r most similar pairs.

    Args:
        metric: (B, N, C) floating point, in which tokens are compared: in a transformer the keys, averaged over heads.
        r: tokens to remove; at most half of those that are not protected.
        class_token, distill_token: whether position 0, and position 1, hold one. Without a class token the tokens
            that stay are in order of falling similarity, else in order of position.
        backend: None chooses; 'torch' or 'triton' insist.

    Raises:
        ValueError: the metric has not three dimensions, r is negative, or the backend cannot take the call.
    """
    _check_metric(metric)
    if r < 0:
        raise ValueError(f'r must not be negative, got {r=}')
    N = metric.shape[1]
    r = min(r, (N - class_token - distill_token) // 2)
    position = torch.arange(N, device=metric.device)
    a, b = position[::2], position[1::2]
    select_from = {'triton': can_run_triton(metric), 'torch': None}
    with torch.no_grad():
        if select('match_tokens', backend, select_from) == 'triton':
            from .triton_match import best_partners_triton  # Triton is imported where it is used

            best, partner = best_partners_triton(metric, class_token, distill_token)
        else:
            best, partner = best_partners(metric, class_token, distill_token)
        order = falling(best)
        stay, source = order[:, r:], order[:, :r]
        if class_token:
            stay = rising(stay)
        return Matching(stay, source, partner.gather(1, source), a, b, N, distill_token)


def match_every_kth(metric: Tensor, k: int) -> Matching:
    """Merges all tokens into every k-th one: of each k tokens the last is in B; N mod k tokens at the end are dropped.

    Raises:
        ValueError: the metric has not three dimensions, or k is not from 2 to N.
    """
    _check_metric(metric)
    N = metric.shape[1]
    if not 2 <= k <= N:
        raise ValueError(f'k must be from 2 to the number of tokens, {N}, got {k=}')
    position = torch.arange(N // k * k, device=metric.device).view(-1, k)
    a, b = position[:, :-1].flatten(), position[:, -1]
    with torch.no_grad():
        unit = metric / metric.norm(dim=-1, keepdim=True)
        partner = (unit[:, a] @ unit[:, b].mT).argmax(-1)
        source = torch.arange(len(a), device=metric.device).expand(len(metric), -1)
        return Matching(source[:, :0], source, partner, a, b, N)


def token_merge(
    x: Tensor, matching: Matching, size: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merges tokens, weighted by how many they stand for.

    Args:
        x: (B, N, C).
        matching: of N tokens.
        size: (B, N, 1); ones if None.
        backend: None chooses; 'torch' or 'triton' insists.

    Returns:
        x (B, N - r, C) and size (B, N - r, 1).

    Raises:
        ValueError: a shape does not fit the matching, or the backend asked for cannot take the call.
    """
    _check_tokens(x, matching, size)
    size = x.new_ones(x.shape[0], x.shape[1], 1) if size is None else size
    if not matching.source.shape[1]:
        return x, size
    place, left = matching.places(), matching.stay.shape[1] + matching.b.numel()
    matched = place.shape[1]  # fewer where some at the end are dropped
    x, size = x[:, :matched], size[:, :matched]
    total = sum_to_places(size, place, left)
    share = size / take_places(total, place)
    moved = matching.a[matching.source]
    return mean_to_places(x, share, place, matching.kept(), moved, backend=backend), total


def merge_source(matching: Matching, source: Tensor | None = None) -> Tensor:
    """Which original tokens each token stands for.

    Args:
        source: (B, N, N0), what this gave before for the N tokens; None at first.

    Returns:
        (B, N - r, N0) zeros and ones.
    """
    if source is None:
        N = matching.tokens
        source = torch.eye(N, device=matching.a.device).expand(matching.stay.shape[0], N, N)
    if not matching.source.shape[1]:
        return source
    place, left = matching.places(), matching.stay.shape[1] + matching.b.numel()
    return sum_to_places(source[:, : place.shape[1]], place, left).clamp_max(1)


def token_unmerge(x: Tensor, matching: Matching) -> Tensor:
    """Gives every original token the values of what it was merged into.

    Args:
        x: (B, N - r, C).

    Returns:
        (B, N, C).

    Raises:
        ValueError: x has not as many tokens as the matching left.
    """
    stay, nb = matching.stay, matching.b.numel()
    left = stay.shape[1] + nb
    if x.ndim != 3 or x.shape[0] != stay.shape[0] or x.shape[1] != left:
        raise ValueError(f'x must be ({stay.shape[0]}, {left}, C), the tokens that merging left, got {tuple(x.shape)=}')
    if not matching.source.shape[1]:
        return x
    return take_places(x, matching.places())


def best_partners(metric: Tensor, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    """(B, |A|) the highest similarity of each token of A, and its partner in B: the definition."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    if class_token:
        scores[:, 0] = float('-inf')
    if distill_token:
        scores[:, :, 0] = float('-inf')
    best, partner = scores.max(-1)
    return best, partner


def can_run_triton(metric: Tensor) -> str | None:
    """Why Triton cannot take this call."""
    if metric.shape[2] > 256:
        return f'the metric is {metric.shape[2]} channels wide, and the kernel takes up to 256'
    return refuse_triton({'metric': metric})


def _check_metric(metric: Tensor) -> None:
    if metric.ndim != 3 or not metric.is_floating_point() or metric.shape[1] < 2:
        raise ValueError(
            f'metric must be (B, N, C) floating point with N >= 2, got {metric.dtype}, {tuple(metric.shape)}'
        )


def _check_tokens(x: Tensor, matching: Matching, size: Tensor | None) -> None:
    B, N = matching.stay.shape[0], matching.tokens
    if x.ndim != 3 or tuple(x.shape[:2]) != (B, N):
        raise ValueError(f'x must be ({B}, {N}, C), the tokens that were matched, got {tuple(x.shape)=}')
    if size is not None and tuple(size.shape) != (*x.shape[:2], 1):
        raise ValueError(f'size must be {(*x.shape[:2], 1)}, one per token, got {tuple(size.shape)=}')
