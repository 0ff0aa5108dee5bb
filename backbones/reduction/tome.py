"""Token Merging: Your ViT But Faster, arXiv 2210.09461.

Written from the paper and the facts of the authors' code, https://github.com/facebookresearch/ToMe (CC-BY-NC 4.0; there
is nothing to load). Between attention and MLP of each block the r most similar pairs of tokens, by the keys averaged
over heads, become one. Differs: layer scale and norms of queries and keys are kept, which the authors' patch for timm
skips.
"""

# B batch, N tokens, C channels
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import Matching, match_tokens, token_merge
from .interface import Block, Reduction, TokenModel, Tokens, register_method
from .schedule import Schedule


@register_method('tome')
class ToMe(Reduction):
    """Bipartite soft matching, see `kernels.match_tokens`.

    Args:
        proportional: a token of size s weighs in attention like s tokens; the authors switch it off where a model was
            trained with merging, and for MAE.
        model, schedule: see `Reduction`.
    """

    merges = True
    overhead = ('fuse',)

    def __init__(self, *, model: TokenModel, schedule: Schedule, proportional: bool = True):
        super().__init__(model=model, schedule=schedule)
        self.proportional = proportional

    def bias(self, tokens: Tokens) -> Tensor | None:
        return super().bias(tokens) if self.proportional else None

    def fuse(self, tokens: Tokens, key: Tensor, r: int) -> Tokens:
        """The tokens without the r whose keys (B, h, N, d) are most similar to others'."""
        return merge_pairs(tokens, key.mean(1), r, self.prefix)

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        query, key, value = block.split(tokens.x)
        x = block.join(tokens.x, block.attend(query, key, value, self.bias(tokens)))
        tokens = tokens._replace(x=x)
        r = self.remove(i, x.shape[1])
        if r:
            tokens = self.fuse(tokens, key, r)
        return tokens._replace(x=block.mix_channels(tokens.x))


# (x, size, matching) -> x, before tokens are merged
Change = Callable[[Tensor, Tensor | None, Matching], Tensor]


def merge_pairs(tokens: Tokens, metric: Tensor, r: int, prefix: int, change: Change | None = None) -> Tokens:
    """The tokens without the r that are most similar to others in `metric` (B, N, any), which take them up.

    Args:
        prefix: tokens ahead that stay as they are. Up to two are matched around, as the authors do; more are set aside.
        change: what is done to the tokens first.
    """
    if prefix <= 2:
        matching = match_tokens(metric, r, class_token=prefix > 0, distill_token=prefix > 1)
        x = tokens.x if change is None else change(tokens.x, tokens.size, matching)
        x, size = token_merge(x, matching, tokens.size)
        return tokens.merged(x, size, None if tokens.place is None else matching.places())
    matching = match_tokens(metric[:, prefix:], r)
    size = torch.ones_like(tokens.x[..., :1]) if tokens.size is None else tokens.size
    x = tokens.x[:, prefix:]
    x = x if change is None else change(x, size[:, prefix:], matching)
    x, merged_size = token_merge(x, matching, size[:, prefix:])
    place = None
    if tokens.place is not None:
        ahead = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        place = torch.cat((ahead, matching.places() + prefix), 1)
    x = torch.cat((tokens.x[:, :prefix], x), 1)
    return tokens.merged(x, torch.cat((size[:, :prefix], merged_size), 1), place)
