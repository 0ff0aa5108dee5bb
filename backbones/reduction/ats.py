"""Adaptive Token Sampling For Efficient Vision Transformers, arXiv 2111.15667: as many tokens as the image needs.

Written from the paper and the facts of the authors' code, https://github.com/adaptivetokensampling/ATS (Apache-2.0;
there is nothing to load: the sampler has no parameters). A patch's significance is the class token's attention to it,
summed over heads, times the norm of its value; heights are spread evenly over the cumulated significance, and the
patches that they hit stay. Differs: what an image gives does not depend on the rest of the batch, as the authors' code
does where images keep different numbers of tokens; their attention adds 1e-6 to each sum of weights. Models without a
class token take the mean of all tokens' attention instead.
"""

# B batch, N tokens now, N0 tokens that entered, P of them prefix tokens, L = N - P patches, C channels, h heads
import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import falling
from .interface import Block, Grid, Reduction, TokenModel, Tokens, register_method
from .schedule import Schedule


def significance(attention: Tensor, value: Tensor) -> Tensor:
    """How much each token matters: (B, N), not normalised.

    Args:
        attention: (B, h, Q, N), the weights of the tokens that are asked, summed over.
        value: (B, h, N, d).
    """
    return attention.sum((1, 2)) * value.square().sum((1, 3)).sqrt()


def sample(
    scores: Tensor, count: int, alive: Tensor | None = None, *, count_dead: bool = False
) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: the patches that `count` evenly spread heights hit.

    With c the cumulated scores in rising order, moved and scaled so that the first is 0 and the last 1, heights run
    from the smallest c above 0 to 1; each hits the patch whose c is nearest, the less significant one if two are. The
    patch with c = 0 is never hit.

    Args:
        scores: (B, L), not negative.
        count: heights; only the `count` most significant patches are hit.
        alive: (B, L) bool, the patches that exist; None if all do.
        count_dead: patches that do not exist have part in the scaling, as in the authors' code for training: the least
            significant one that exists can then be hit.

    Returns:
        order (B, L) int64, the patches by rising significance, those that do not exist first, and (B, L) bool, which of
        them are hit, in that order.

    """
    L = scores.shape[1]
    scores = scores.float()
    if alive is not None:
        scores = torch.where(alive, scores, -1.0)
    order = falling(-scores)
    scores = scores.gather(1, order).clamp_min(0)
    cumulated = (scores / scores.sum(1, keepdim=True)).cumsum(1)
    if alive is None or count_dead:
        lowest = cumulated[:, :1]
    else:
        lowest = cumulated.gather(1, (L - alive.sum(1, keepdim=True)).clamp(max=L - 1))
    heights = ((cumulated - lowest) / (cumulated[:, -1:] - lowest).clamp_min(1e-12)).clamp_min(0)
    candidate = heights > 0
    first = torch.where(candidate, heights, 1.0).amin(1, keepdim=True)
    if count < L:
        candidate = candidate & (torch.arange(L, device=scores.device) >= L - count)
    # A height is nearer to a patch, or to one before it, than to the next one if it is at most the middle between the
    # two: how many of the heights first + i (1 - first) / (count - 1) are, is counted instead of compared one by one.
    middle = (heights[:, 1:] + heights[:, :-1]) / 2
    below = torch.floor((middle - first) * ((count - 1) / (1 - first).clamp_min(1e-12))) + 1
    below = torch.where(candidate[:, :-1], below.clamp_min(0), 0.0)
    return order, candidate & (F.pad(below, (0, 1), value=float('inf')) > F.pad(below, (1, 0)))


@register_method('ats')
class ATS(Reduction):
    """Adaptive token sampling inside the attention of the blocks that reduce.

    The schedule's amounts are the least that leave: with r=0, as published, only the image decides. In eager mode a
    batch is shortened to the image with the most tokens; compiled and exported graphs keep the schedule's length and
    mask, with equal results. In dense form a dropped patch keeps what it was when it was dropped.

    Args:
        drop_tokens: False gives the authors' form for training: nothing is shortened, and dropped tokens have part in
            the sampling of later blocks, which lets the least significant patch be sampled.
        model, schedule: see `Reduction`.
    """

    defaults = {'r': 0}
    first_layer = 3
    most = 1.0
    least = 8  # the authors'

    def __init__(self, *, model: TokenModel, schedule: Schedule, drop_tokens: bool = True):
        super().__init__(model=model, schedule=schedule)
        self.drop_tokens = drop_tokens
        self.by_token = bool(model.prefix)

    def begin(self, x: Tensor, grid: Grid, track: bool) -> Tokens:
        tokens = super().begin(x, grid, track)
        # the number of tokens that entered, as a size; and what dropped patches are given back
        return tokens._replace(extra=(x if track else x.new_zeros(0, x.shape[1]),))

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        if i not in self.schedule.active:
            return self.plain_step(tokens, block)
        P, (before,) = self.prefix, tokens.extra
        x, alive = tokens.x, tokens.alive
        B, N, C = x.shape
        query, key, value = block.split(x)
        bias = self.bias(tokens)
        with torch.no_grad():
            asked = query[:, :, :1] if self.by_token else query
            weights = block.weigh(asked, key, bias)
            if not self.by_token and alive is not None:
                weights = weights * alive[:, None, :, None]
            scores = significance(weights, value)[:, P:]
            patches = None if alive is None else alive[:, P:]
            count = self.most_left(i, before.shape[1]) - P
            order, kept = sample(scores, count, patches, count_dead=not self.drop_tokens)
            chosen, left = _compact(order, kept, self._length(kept, min(count, N - P)))
            index = torch.cat((torch.arange(P, device=x.device).expand(B, -1), chosen + P), 1)
            exists = F.pad(left, (P, 0), value=True)
            place = None
            if tokens.place is not None:
                where = torch.arange(index.shape[1], device=x.device).expand(B, -1)
                place = torch.full((B, N), -1, device=x.device, dtype=torch.int64)
                # those that only fill up write to a place of their own, which is cut off
                place = F.pad(place, (0, 1)).scatter(1, torch.where(exists, index, N), where)[:, :N]
                before = self.restore(tokens)
        rows = index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        out = block.attend(query.gather(2, rows), key, value, bias)
        mixed = block.join(x.gather(1, index[..., None].expand(-1, -1, C)), out)
        alive = None if self.drop_tokens and B == 1 and not _fixed(x) else exists
        return Tokens(block.mix_channels(mixed), None, tokens.moved(place), alive, (before,))

    def restore(self, tokens: Tokens) -> Tensor:
        place = tokens.place
        if place is None:
            return tokens.x
        index = place.clamp_min(0)[..., None].expand(-1, -1, tokens.x.shape[2])
        return torch.where(place[..., None] < 0, tokens.extra[0], tokens.x.gather(1, index))

    def most_left(self, i: int, tokens: int) -> int:
        """How many of `tokens` that entered the first block can be left after block i: no image keeps more."""
        for j in range(i + 1):
            if self.schedule.amounts[j]:  # otherwise a symbolic number stays what it is
                tokens -= self.remove(j, tokens)
        return tokens

    def _length(self, kept: Tensor, most: int) -> int:
        """How many patches are carried on."""
        if not self.drop_tokens or _fixed(kept):
            return most
        return max(int(kept.sum(1).max()), 1)


def _fixed(x: Tensor) -> bool:
    """Whether shapes must not depend on values."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or x.is_meta


def _compact(order: Tensor, kept: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` of (B, L) patches with those kept ahead, in their order, and which of them are kept."""
    position = torch.arange(order.shape[1], device=order.device)
    first = falling(torch.where(kept, order.shape[1] - position, -position).float())[:, :length]
    return order.gather(1, first), kept.gather(1, first)
