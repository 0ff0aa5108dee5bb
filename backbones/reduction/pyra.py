"""PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task Adaptation, arXiv 2403.09192.

Written from the paper and the facts of the authors' code, https://github.com/THU-MIG/PYRA (MIT; no weights of tasks are
published; their keys load). Token merging whose merged tokens are re-activated first, by weights per channel and per
token that few parameters yield, beside small adapters: what is trained for a task while the backbone stays. Differs:
for other numbers of merged tokens than the weights are made for, the weights are interpolated.
"""

# B batch, N tokens, C channels, r merged tokens, a rank of the adapters
import math
import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import Matching
from ..layers.linear import Linear
from .interface import Block, TokenModel, Tokens, register_method
from .schedule import Schedule
from .timm_vit import TimmBlock
from .tome import Change, ToMe, merge_pairs


class ReActivation(nn.Module):
    """x -> x + x w_c w_t for tokens (B, r, C) that are about to be merged into partners (B, r, C).

    With u = norm(x + partner), w_c = 2 sigmoid(a u) is a weight per channel, (B, 1, C), w_t = 2 sigmoid(u b) - 1 one
    per token, (B, r, 1). b starts at 0, where nothing changes. The parameters have the authors' names.

    Args:
        dim: C.
        count: r that `pyra_a` is made for.
    """

    def __init__(self, *, dim: int, count: int):
        super().__init__()
        self.pyra_a = nn.Parameter(torch.empty(count, 1))
        self.pyra_b = nn.Parameter(torch.zeros(1, dim))
        self.pyra_norm = nn.LayerNorm(dim)
        nn.init.kaiming_uniform_(self.pyra_a, a=math.sqrt(5))

    def forward(self, x: Tensor, partner: Tensor) -> Tensor:
        both = self.pyra_norm(x + partner)
        by_rank: Tensor = self.pyra_a
        if x.shape[1] != by_rank.shape[0]:
            by_rank = F.interpolate(by_rank.T[None], size=x.shape[1], mode='linear', align_corners=True)[0].T
        channel = 2 * torch.sigmoid(by_rank.T @ both)
        token = 2 * torch.sigmoid(both @ self.pyra_b.T) - 1
        return x + x * channel * token


class LowRank(nn.Module):
    """What is added to queries, keys and values: up(down(x)), zeros at first; (B, N, C) -> (B, N, 3C)."""

    def __init__(self, *, dim: int, rank: int):
        super().__init__()
        self.down = Linear(dim, rank, bias=False)
        self.up = Linear(rank, 3 * dim, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Bottleneck(nn.Module):
    """x -> x + up(act(down(x))), act the sigmoid approximation of GELU; (B, N, C) -> (B, N, C)."""

    def __init__(self, *, dim: int, rank: int):
        super().__init__()
        self.down = Linear(dim, rank)
        self.up = Linear(rank, dim)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x)
        return x + self.up(hidden * torch.sigmoid(1.702 * hidden))


@register_method('pyra')
class PYRA(ToMe):
    """ToMe whose merged tokens are re-activated, with adapters.

    The authors' schedules of twelve blocks are r=(16,) * 11 + (10,), 'low', and r=(40, 34, 30, 24, 18, 14, 10, 8, 4, 4,
    3, 3), 'high'.

    Args:
        adapter: 'lora', added to queries, keys and values; 'bottleneck', after the MLP; or None.
        rank: of the adapters.
        proportional: see `ToMe`.
        model, schedule: see `Reduction`.
    """

    defaults: ClassVar[dict[str, Any]] = {'r': 16}

    def __init__(
        self,
        *,
        model: TokenModel,
        schedule: Schedule,
        adapter: str | None = 'lora',
        rank: int = 8,
        proportional: bool = True,
    ):
        super().__init__(model=model, schedule=schedule, proportional=proportional)
        if adapter not in (None, 'lora', 'bottleneck'):
            raise ValueError(f"adapter must be 'lora', 'bottleneck' or None, got {adapter=}")
        if rank < 1:
            raise ValueError(f'rank must be positive, got {rank=}')
        self.num_heads = model.num_heads
        if adapter == 'lora' and not all(hasattr(block, 'norm1') for block in map(_inner, model.blocks())):
            raise ValueError("adapter='lora' needs blocks with one norm before attention; take adapter='bottleneck'")
        merged, left = {}, model.tokens
        for i in range(model.depth):
            r = self.remove(i, left)
            left -= r
            if r:
                merged[str(i)] = ReActivation(dim=model.dim, count=r)
        self.merged = nn.ModuleDict(merged)
        make = {'lora': LowRank, 'bottleneck': Bottleneck}.get(adapter or '')
        adapters = [make(dim=model.dim, rank=rank) for _ in range(model.depth)] if make else []
        self.lora = nn.ModuleList(adapters if adapter == 'lora' else [])
        self.adapters = nn.ModuleList(adapters if adapter == 'bottleneck' else [])

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        query, key, value = self._split(tokens.x, block, i)
        x = block.join(tokens.x, block.attend(query, key, value, self.bias(tokens)))
        tokens = tokens._replace(x=x)
        r = self.remove(i, x.shape[1])
        if r:
            tokens = merge_pairs(tokens, key.mean(1), r, self.prefix, self._activated(i))
        return tokens._replace(x=self._mix_channels(tokens.x, block, i))

    def prefix_step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        query, key, value = self._split(tokens.x, block, i)
        out = block.attend(query[:, :, : self.prefix], key, value, self.bias(tokens))
        return Tokens(self._mix_channels(block.join(tokens.x[:, : self.prefix], out), block, i))

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """The authors' names, in place."""
        for key in list(state):
            for pattern, ours in _RENAMES:
                match = re.fullmatch(pattern, key)
                if match:
                    state[prefix + match.expand(ours)] = state.pop(key)
                    break

    def _activated(self, i: int) -> Change:
        """Re-activates the tokens that are about to be merged."""
        module = dict(self.merged.items()).get(str(i))

        def activated(x: Tensor, size: Tensor | None, matching: Matching) -> Tensor:
            if module is None:  # an image so large that a block merges which does not at the model's own size
                return x
            wide = (-1, -1, x.shape[2])
            source = matching.a[matching.source]
            target = matching.b[matching.target]
            weighted = x if size is None else x * size
            own, partner = (weighted.gather(1, index[..., None].expand(wide)) for index in (source, target))
            changed = module(own, partner)
            if size is not None:
                changed = changed / size.gather(1, source[..., None])
            return x.scatter(1, source[..., None].expand(wide), changed.to(x.dtype))

        return activated

    def _split(self, x: Tensor, block: Block, i: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = block.split(x)
        if not self.lora:
            return heads
        added = self.lora[i](_inner(block).norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = (own + more for own, more in zip(heads, added))
        return query, key, value

    def _mix_channels(self, x: Tensor, block: Block, i: int) -> Tensor:
        mixed = block.mix_channels(x)
        return x + self.adapters[i](mixed - x) if self.adapters else mixed


_RENAMES = [
    (r'blocks\.(\d+)\.(pyra_(?:a|b|norm\.weight|norm\.bias))', r'merged.\1.\2'),
    (r'blocks\.(\d+)\.attn\.LoRA_a\.weight', r'lora.\1.down.weight'),
    (r'blocks\.(\d+)\.attn\.LoRA_b\.weight', r'lora.\1.up.weight'),
    (r'blocks\.(\d+)\.adapter\.ln1\.(weight|bias)', r'adapters.\1.down.\2'),
    (r'blocks\.(\d+)\.adapter\.ln2\.(weight|bias)', r'adapters.\1.up.\2'),
]


def _inner(block: Any) -> Any:
    return block.block if isinstance(block, TimmBlock) else block
