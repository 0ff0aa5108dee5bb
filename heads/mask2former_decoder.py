"""The masked-attention decoder of Mask2Former (Cheng et al. 2022, arXiv:2112.01527): each layer's queries look at the
cells that their mask of the layer before covers, on three maps in turn.

Written from the paper and from facts of facebookresearch/Mask2Former (MIT).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pyramid import positive
from .seeds import SeedQueries
from .transformer import MLP, sine_positions

# B batch, Q queries, C width, N cells of a map, h heads, d head width, K classes, D channels of the map for masks


class Attention(nn.Module):
    """Attention with a shortcut and a norm behind it, or before with pre_norm.

    (B, Q, C) -> (B, Q, C); positions are added to queries and keys, never to values.
    """

    def __init__(self, *, channels: int, num_heads: int, pre_norm: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.pre_norm = pre_norm
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(
        self,
        x: Tensor,
        place: Tensor,
        memory: Tensor | None = None,
        position: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """memory (B, N, C) and its position (1, N, C); None: the queries themselves. seen (B, Q, N) bool: where a
        query may look."""

        def look(y: Tensor) -> Tensor:
            if memory is None or position is None:
                return attend(self.attention, y + place, y + place, y)
            return attend(self.attention, y + place, memory + position, memory, seen)

        return residual(x, self.norm, look, self.pre_norm)


class FeedForward(nn.Module):
    """Two linear layers with ReLU between, with a shortcut."""

    def __init__(self, *, channels: int, hidden: int, pre_norm: bool):
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)
        self.pre_norm = pre_norm
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return residual(x, self.norm, lambda y: self.linear2(F.relu(self.linear1(y))), self.pre_norm)


def residual(x: Tensor, norm: nn.Module, compute: Callable[[Tensor], Tensor], pre_norm: bool) -> Tensor:
    """x + compute(norm(x)), or norm(x + compute(x))."""
    return x + compute(norm(x)) if pre_norm else norm(x + compute(x))


def attend(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None
) -> Tensor:
    """What the module computes, with a mask that all heads share and that is never repeated for each."""
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(x, weight, bias).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases)
    )
    mask = None if seen is None else seen[:, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


class MaskedDecoder(nn.Module):
    """Layers of masked attention to a map, self-attention, linear layers; predictions before and after each.

    Args:
        channels: C, of the queries and the maps.
        mask_channels: D.
        num_queries: Q.
        num_layers: the published 10 are these 9 and the prediction of the learnt queries.
        hidden, num_heads, pre_norm: of a layer.
        project: a 1x1 convolution of each map, though its width is C.
        learnt_queries: queries start from a table; without, `start` must be given.
        num_seeds: G further queries that start from cells of the second map, see `seeds`.
        seed_classes: of those cells.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 256,
        mask_channels: int = 256,
        num_queries: int = 100,
        num_layers: int = 9,
        hidden: int = 2048,
        num_heads: int = 8,
        pre_norm: bool = False,
        project: bool = False,
        learnt_queries: bool = True,
        num_seeds: int = 0,
        seed_classes: Sequence[int] = (),
    ):
        super().__init__()
        if channels % positive('num_heads', num_heads):
            raise ValueError(f'channels must be a multiple of num_heads={num_heads}, got {channels}')
        self.channels = channels
        count = positive('num_layers', num_layers)
        attention = partial(Attention, channels=channels, num_heads=num_heads, pre_norm=pre_norm)
        self.cross_attention = nn.ModuleList(attention() for _ in range(count))
        self.self_attention = nn.ModuleList(attention() for _ in range(count))
        self.feed_forward = nn.ModuleList(
            FeedForward(channels=channels, hidden=hidden, pre_norm=pre_norm) for _ in range(count)
        )
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(positive('num_queries', num_queries), channels) if learnt_queries else None
        self.query_embed = nn.Embedding(num_queries, channels)
        self.level_embed = nn.Embedding(3, channels)
        self.input_proj = nn.ModuleList(
            nn.Conv2d(channels, channels, 1) if project else nn.Identity() for _ in range(3)
        )
        for part in self.input_proj:
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_uniform_(part.weight, a=1)
                nn.init.zeros_(part.get_parameter('bias'))
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = MLP(in_channels=channels, channels=channels, out_channels=mask_channels, depth=3)
        if num_seeds < 0:
            raise ValueError(f'num_seeds must not be negative, got {num_seeds}')
        self.seeds = None
        if num_seeds:
            self.seeds = SeedQueries(channels=channels, number=num_seeds, classes=seed_classes or range(num_classes))

    def forward(
        self,
        levels: Sequence[Tensor],
        mask_features: Tensor,
        start: Tensor | None = None,
        task: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Three maps, coarsest first, and the map for masks -> class logits (B, Q + G, K + 1) and mask logits
        (B, Q + G, H, W) of the initial queries and of every layer; `task` (B, 1, C) is added to the G seeds."""
        memories = [
            (project(x) + embed[:, None, None]).flatten(2).transpose(1, 2)
            for project, x, embed in zip(self.input_proj, levels, self.level_embed.weight)
        ]
        sizes = [x.shape[-2:] for x in levels]
        positions = [
            sine_positions(h, w, self.channels, None, x.device).to(x.dtype) for x, (h, w) in zip(levels, sizes)
        ]
        place = self.query_embed.weight
        if start is None:
            assert self.query_feat is not None
            start = self.query_feat.weight.expand(mask_features.shape[0], -1, -1)
        query, seeds = start, None
        if self.seeds is not None:
            seeds = self.seeds(levels[1], positions[1], mask_features.shape[-2:], self.classify, task)
            place = torch.cat([place.expand(query.shape[0], -1, -1), seeds.place], 1)
            query = torch.cat([query, seeds.query], 1)
        classes, masks = [], []
        for i in range(len(self.cross_attention) + 1):
            shown = self.decoder_norm(query)
            classes.append(self.class_embed(shown))
            masks.append(torch.einsum('bqc,bchw->bqhw', self.mask_embed(shown), mask_features))
            if self.seeds is not None and seeds is not None:
                masks[-1] = self.seeds.keep_near(masks[-1], shown, seeds)
            if i == len(self.cross_attention):
                break
            level = i % 3
            seen = where_to_look(masks[-1].detach(), sizes[level])
            query = self.cross_attention[i](query, place, memories[level], positions[level], seen)
            query = self.feed_forward[i](self.self_attention[i](query, place))
        return classes, masks

    def classify(self, query: Tensor) -> Tensor:
        """Queries (B, N, C) -> logits of classes (B, N, K + 1)."""
        return self.class_embed(self.decoder_norm(query))


def where_to_look(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Mask logits (B, Q, H, W) -> (B, Q, N) bool: inside the mask, everywhere for a query whose mask is empty."""
    inside = F.interpolate(masks, size=tuple(size), mode='bilinear', align_corners=False).flatten(2) >= 0
    return inside | ~inside.any(2, keepdim=True)
