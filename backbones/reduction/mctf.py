"""Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers, arXiv 2403.10030.

Written from the paper and the facts of the authors' code, https://github.com/mlvlab/MCTF (CC-BY-NC 4.0, as the parts of
ToMe that it contains; the weights are plain DeiT's). Differs: several prefix tokens are set aside (the authors' code
would move a distillation token). The fused attention matrix is never written down: with S and W the matrices that sum
columns and average rows, (W A S) v = W (A (S v)), and S v gives each token the values of what it became part of.

Training with reduction consistency (a second pass with fewer removals as teacher) is `train.ReducedClassifier`.
"""

# B batch, N tokens, M after fusion, C channels, h heads, d head width
from typing import Literal, get_args

import torch
from torch import Tensor

from ...kernels import Fusion, fuse_by_scores, fusion_scores, mean_to_places, sum_to_places, take_places
from .interface import Block, Reduction, TokenModel, Tokens, register_method
from .schedule import Schedule

Ahead = Literal['fused', 'precise', 'none']
Pooling = Literal['attention', 'size', 'max', 'mean']


@register_method('mctf')
class MCTF(Reduction):
    """Fusion by similarity, information and size, see `kernels.token_fusion`.

    Args:
        tau_sim, tau_info, tau_size: temperatures of the criteria; 0 leaves one out.
        both_ways: half of the tokens move from A to B and half from B to A; otherwise all from A to B.
        ahead: 'fused': tokens are fused before attention, by this block's own attention, whose matrix is fused rather
            than computed anew; 'precise': computed anew; 'none': fused after the block.
        pooling: 'attention': fused tokens are means weighted by size and received attention; 'size': by size; 'mean':
            plain; 'max': the largest value of each channel.
        proportional: a token of size s weighs in attention like s tokens.
        model, schedule: see `Reduction`.
    """

    defaults = {'r': 16}
    first_layer = 1
    least = 10
    merges = True
    overhead = ('fuse', 'fuse_rows')

    def __init__(
        self,
        *,
        model: TokenModel,
        schedule: Schedule,
        tau_sim: float = 1.0,
        tau_info: float = 20.0,
        tau_size: float = 40.0,
        both_ways: bool = True,
        ahead: Ahead = 'fused',
        pooling: Pooling = 'attention',
        proportional: bool = True,
    ):
        super().__init__(model=model, schedule=schedule)
        for name, tau in (('tau_sim', tau_sim), ('tau_info', tau_info), ('tau_size', tau_size)):
            if not isinstance(tau, int | float) or tau < 0:
                raise ValueError(f'{name} must be 0 or positive, got {name}={tau!r}')
        for name, choice, allowed in (('ahead', ahead, Ahead), ('pooling', pooling, Pooling)):
            if choice not in get_args(allowed):
                raise ValueError(f'{name} must be one of {", ".join(get_args(allowed))}, got {name}={choice!r}')
        self.taus = {'tau_sim': tau_sim, 'tau_info': tau_info, 'tau_size': tau_size}
        self.both_ways, self.ahead, self.pooling, self.proportional = both_ways, ahead, pooling, proportional

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        r = self.remove(i, tokens.x.shape[1])
        if not r:
            return self.plain_step(tokens, block)
        if self.ahead == 'fused':
            return self._fused_step(tokens, block, r)
        if self.ahead == 'precise':
            with torch.no_grad():
                weights = block.weigh(*block.query_key(tokens.x), self.bias(tokens))
            tokens = self.fuse(tokens, weights, r)[0]
            return self.plain_step(tokens, block)
        query, key, value = block.split(tokens.x)
        weights = block.weigh(query, key, self.bias(tokens))
        x = block.mix_channels(block.join(tokens.x, weights @ value))
        return self.fuse(tokens._replace(x=x), weights, r)[0]

    def prefix_step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        r = self.remove(i, tokens.x.shape[1])
        if self.ahead == 'precise' and r:
            return self.step(tokens, block, i)
        if self.ahead == 'none' or not r:
            return super().prefix_step(tokens, block, i)
        weights = block.weigh(*block.query_key(tokens.x), self.bias(tokens))
        fused, fusion, _ = self.fuse(tokens, weights, r)
        out = weights[:, :, : self.prefix] @ _spread(block.value(fused.x), fusion.place)
        x = block.join(fused.x[:, : self.prefix], out)
        return Tokens(block.mix_channels(x))

    def bias(self, tokens: Tokens) -> Tensor | None:
        return super().bias(tokens) if self.proportional else None

    def _fused_step(self, tokens: Tokens, block: Block, r: int) -> Tokens:
        weights = block.weigh(*block.query_key(tokens.x), self.bias(tokens))
        tokens, fusion, share = self.fuse(tokens, weights, r)
        value = block.value(tokens.x)
        if share is None:
            out = self._largest_rows(weights, fusion) @ value
        else:
            # equal values for tokens that became one sum the matrix's columns; its rows are fused after the product
            out = self.fuse_rows(weights @ _spread(value, fusion.place), fusion, share)
        return tokens._replace(x=block.mix_channels(block.join(tokens.x, out)))

    def fuse_rows(self, out: Tensor, fusion: Fusion, share: Tensor) -> Tensor:
        """What the N tokens attended to (B, h, N, d), for the fused ones (B, h, M, d)."""
        heads = out.shape[1]
        out = mean_to_places(out.transpose(1, 2).flatten(2), share, fusion.place, fusion.kept, fusion.moved)
        return out.unflatten(2, (heads, -1)).transpose(1, 2)

    def _largest_rows(self, weights: Tensor, fusion: Fusion) -> Tensor:
        """(B, h, M, M), with the largest weights of rows that become one."""
        B, heads, N, _ = weights.shape
        place = _of_heads(fusion.place, heads)
        columns = torch.zeros_like(weights).scatter_add(3, place[:, :, None].expand(-1, -1, N, -1), weights)
        rows = _largest(columns[..., : fusion.left].flatten(0, 1), place.flatten(0, 1), fusion.left)
        return rows.unflatten(0, (B, heads))

    def fuse(self, tokens: Tokens, weights: Tensor, r: int) -> tuple[Tokens, Fusion, Tensor | None]:
        """The fused tokens, where tokens went, and the share (B, N, 1) that each has of what it became part of; None
        for the largest."""
        x, first = tokens.x, self.prefix if self.prefix > 1 else 0
        with torch.no_grad():
            received = weights.mean((1, 2))
            size = torch.ones_like(x[..., :1]) if tokens.size is None else tokens.size
            scores = fusion_scores(
                x[:, first:], received[:, first:], None if tokens.size is None else size[:, first:], **self.taus
            )
            fusion = fuse_by_scores(scores, r, class_token=self.prefix == 1, both_ways=self.both_ways)
            if first:
                ahead = torch.arange(first, device=x.device).expand(x.shape[0], -1)
                place, kept = (torch.cat((ahead, rows + first), 1) for rows in (fusion.place, fusion.kept))
                fusion = Fusion(place, kept, fusion.moved + first)
            share = self._share(received, size, fusion)
            merged_size = sum_to_places(size, fusion.place, fusion.left)
        if share is None:
            x = _largest(x, fusion.place, fusion.left)
        else:
            x = mean_to_places(x, share, fusion.place, fusion.kept, fusion.moved)
        return tokens.merged(x, merged_size, fusion.place), fusion, share

    def _share(self, received: Tensor, size: Tensor, fusion: Fusion) -> Tensor | None:
        if self.pooling == 'max':
            return None
        if self.pooling == 'attention':
            weight = received[..., None] * (size / size.amax(1, keepdim=True))
        else:
            weight = size if self.pooling == 'size' else torch.ones_like(size)
        return weight / take_places(sum_to_places(weight, fusion.place, fusion.left), fusion.place)


def _spread(value: Tensor, place: Tensor) -> Tensor:
    """(B, h, M, d) -> (B, h, N, d), for each token the value of what it became part of."""
    B, heads = value.shape[:2]
    return take_places(value.flatten(0, 1), _of_heads(place, heads).flatten(0, 1)).unflatten(0, (B, heads))


def _of_heads(place: Tensor, heads: int) -> Tensor:
    """(B, h, N)."""
    return place[:, None].expand(-1, heads, -1)


def _largest(x: Tensor, place: Tensor, left: int) -> Tensor:
    """(B, N, C) -> (B, left, C), the largest values of what goes to each place."""
    lowest = x.new_full((x.shape[0], left, x.shape[2]), float('-inf'))
    return lowest.scatter_reduce(1, place[..., None].expand_as(x), x, 'amax', include_self=False)
