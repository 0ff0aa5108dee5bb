"""Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, arXiv 2303.13755.

Written from the paper and the facts of the authors' code, https://github.com/lim142857/Sparsifiner (MIT; no weights are
published; its keys load). All tokens stay; each patch attends to the share of the tokens that a cheap prediction of its
attention row names. The prediction has low rank: few coefficients of each query times a basis of rows over the tokens.
Differs: the basis is resized with the grid, so that every image size is taken; prefix tokens beside the class token
attend to all tokens too; the loss of reconstruction compares with the model's own attention, not with a teacher's.
"""

# B batch, N tokens, P of them prefix tokens, h heads, d head width, c reduced width, K rows of the basis
import re
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import block_sparse_attention
from ..layers.grid import ceil_div
from ..layers.linear import Linear
from ..layers.resize import resize_table, same_size
from ..layers.token_attention import TokenAttention
from .interface import Block, Grid, Reduction, TokenModel, Tokens, register_method
from .schedule import Schedule
from .timm_vit import TimmBlock


class ConnectivityPredictor(nn.Module):
    """A low-rank prediction of attention: softmax(s q' (k'^T E)) F^T with q', k' reduced queries and keys.

    The authors' names: `proj_n` is E (N, K), `proj_back_n` is F (N, K). s is h ** -0.5, theirs.

    Args:
        head_dim, num_heads: of the attention.
        prefix, grid: prefix tokens and (H, W) of the patches that E and F are made for.
        width_factor, token_factor: d / c and N / K.
        coefficients: of each row, so many of the K are kept.
        threshold: entries of F that are smaller in magnitude count as 0.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        num_heads: int,
        prefix: int,
        grid: Grid,
        width_factor: int,
        token_factor: int,
        coefficients: int,
        threshold: float,
    ):
        super().__init__()
        tokens = prefix + grid[0] * grid[1]
        self.prefix, self.grid, self.scale = prefix, grid, num_heads**-0.5
        self.threshold = threshold
        width, rank = max(head_dim // width_factor, 1), max(tokens // token_factor, 1)
        self.coefficients = min(coefficients, rank)
        self.proj_c_q = Linear(head_dim, width)
        self.proj_c_k = Linear(head_dim, width)
        self.proj_n = nn.Parameter(torch.empty(tokens, rank))
        self.proj_back_n = nn.Parameter(torch.empty(tokens, rank))
        for weight in (self.proj_c_q.weight, self.proj_c_k.weight, self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (self.proj_c_q, self.proj_c_k):
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, key: Tensor, grid: Grid, sparse: bool = True) -> Tensor:
        """(B, h, H W, N), the predicted attention of the patches, not normalised.

        Args:
            query, key: (B, h, N, d), prefix tokens first.
            grid: (H, W) of the patches.
            sparse: with few coefficients and a basis cut at the threshold, as masks are made; otherwise all, as is
                trained.
        """
        gather, basis = (self._for(table, grid) for table in (self.proj_n, self.proj_back_n))
        # its product is a sum over the tokens, of other numbers of them too
        gather = gather * (self.proj_n.shape[0] / (self.prefix + grid[0] * grid[1]))
        reduced = self.proj_c_k(key).transpose(-2, -1) @ gather  # (B, h, c, K)
        coefficient = (self.proj_c_q(query[:, :, self.prefix :]) @ reduced * self.scale).softmax(-1)
        if sparse:
            value, index = coefficient.topk(self.coefficients)
            coefficient = torch.zeros_like(coefficient).scatter(-1, index, value)
            basis = basis.abs()
            basis = torch.where(basis > self.threshold, basis, 0.0)
        return coefficient @ basis.T

    def _for(self, table: Tensor, grid: Grid) -> Tensor:
        """(N, K) for another grid."""
        if same_size(grid, self.grid):
            return table
        resized = resize_table(table[self.prefix :].unflatten(0, self.grid), grid, 'bilinear').flatten(0, 1)
        return torch.cat((table[: self.prefix], resized.to(table.dtype)))


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Bool, of the shape of `scores`: its `count` highest entries in the last dimension."""
    index = scores.topk(count, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)


@register_method('sparsifiner')
class Sparsifiner(Reduction):
    """Attention of each patch to the tokens that a low-rank prediction finds highest; the published settings.

    Weights are trained in two phases: first with `reconstruction` above 0, in which training attends to everything and
    adds the distance of prediction and attention to the loss; then with 0, through the masks.

    Args:
        keep: share of the tokens that a patch attends to.
        block: tokens are kept in blocks of so many (powers of two from 16 run in a kernel on a GPU), by the mean of the
            predictions; 1 keeps single tokens, as published.
        width_factor, token_factor: how many times narrower heads and fewer rows the prediction has.
        coefficients: that each row keeps.
        threshold: of the basis.
        reconstruction: weight of that loss; the authors' first phase takes 0.01.
        model, schedule: see `Reduction`; of the schedule `layers` alone has a meaning.
    """

    defaults = {'r': 0}

    def __init__(
        self,
        *,
        model: TokenModel,
        schedule: Schedule,
        keep: float = 0.25,
        block: int = 1,
        width_factor: int = 2,
        token_factor: int = 6,
        coefficients: int = 8,
        threshold: float = 2e-2,
        reconstruction: float = 0.0,
    ):
        super().__init__(model=model, schedule=schedule)
        if any(schedule.amounts):
            raise ValueError(
                'sparsifiner takes neither r, ratio nor target, as all tokens stay; keep= says what is seen'
            )
        if not 0 < keep <= 1:
            raise ValueError(f'keep must be above 0 and at most 1, got {keep=}')
        for name, value in (('block', block), ('width_factor', width_factor), ('token_factor', token_factor)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive whole number, got {name}={value!r}')
        if coefficients < 1:
            raise ValueError(f'coefficients must be positive, got {coefficients=}')
        self.share, self.block, self.reconstruction = Fraction(keep).limit_denominator(1000), block, reconstruction
        self.predictors = nn.ModuleDict(
            {
                str(i): ConnectivityPredictor(
                    head_dim=model.dim // model.num_heads,
                    num_heads=model.num_heads,
                    prefix=len(model.prefix),
                    grid=model.grid,
                    width_factor=width_factor,
                    token_factor=token_factor,
                    coefficients=coefficients,
                    threshold=threshold,
                )
                for i in schedule.active
            }
        )
        self.predictors.requires_grad_(reconstruction > 0)  # a mask has no gradient

    def begin(self, x: Tensor, grid: Grid, track: bool) -> Tokens:
        # the grid, as a shape, and the loss so far
        return super().begin(x, grid, track)._replace(extra=(x.new_zeros(0, *grid), x.new_zeros(())))

    def step(self, tokens: Tokens, block: Block, i: int) -> Tokens:
        if str(i) not in self.predictors:
            return self.plain_step(tokens, block)
        predictor, (shape, loss) = self.predictors[str(i)], tokens.extra
        grid = shape.shape[1:]
        query, key, value = block.split(tokens.x)
        if self.training and self.reconstruction:
            weights = block.weigh(query, key)
            predicted = predictor(query.detach(), key.detach(), grid, sparse=False)
            loss = loss + (predicted - weights[:, :, self.prefix :].detach()).square().sum() / len(query)
            out = weights @ value
        else:
            with torch.no_grad():
                mask = self.mask(predictor(query, key, grid))
            out = self._attend(block, query, key, value, mask)
        x = block.mix_channels(block.join(tokens.x, out))
        return tokens._replace(x=x, extra=(shape, loss))

    def mask(self, scores: Tensor) -> Tensor:
        """Which blocks of tokens each block of queries sees, (B, h, nq, nk) bool, from (B, h, H W, N) predictions;
        prefix tokens see all."""
        N = scores.shape[3]
        if self.block == 1:
            seen = keep_highest(scores, self._count(N))
            return F.pad(seen, (0, 0, self.prefix, 0), value=True)
        side, count = self.block, ceil_div(N, self.block)
        below, right = count * side - N, count * side - N
        tiles = F.pad(scores, (0, right, self.prefix, below)).unflatten(3, (count, side)).unflatten(2, (count, side))
        # the mean but for a factor that a row of tiles shares
        existing = (N - torch.arange(count, device=scores.device) * side).clamp(max=side)
        seen = keep_highest(tiles.sum((3, 5)) / existing, self._count(count))
        ahead = ceil_div(self.prefix, self.block)
        return torch.cat((torch.ones_like(seen[:, :, :ahead]), seen[:, :, ahead:]), 2)

    def penalties(self, tokens: Tokens) -> dict[str, Tensor]:
        if not self.reconstruction:
            return {}
        return {'reconstruction': self.reconstruction * tokens.extra[1] / max(len(self.predictors), 1)}

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """The authors' names, in place."""
        for key in list(state):
            match = re.match(r'blocks\.(\d+)\.attn\.mask_predictor\.', key)
            if match:
                state[f'{prefix}predictors.{match[1]}.{key[match.end() :]}'] = state.pop(key)

    def _count(self, tokens: int) -> int:
        """The share of them, rounded up; in whole numbers, which stay exact where they are symbolic."""
        part, whole = self.share.numerator, self.share.denominator
        return (tokens * part + whole - 1) // whole

    def _attend(self, block: Block, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scale = plain_scale(block)
        if scale is not None:
            return block_sparse_attention(query, key, value, mask, block=self.block, scale=scale)
        if self.block > 1:
            wide = mask.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)
            mask = wide[:, :, : query.shape[2], : key.shape[2]]
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float('-inf'))
        return block.attend(query, key, value, bias)


def plain_scale(block: Block) -> float | None:
    """The scale of the block's products, where its attention is a softmax of them and nothing more."""
    inner = block.block if isinstance(block, TimmBlock) else block
    attn = getattr(inner, 'attn', None)
    if attn is None or (attn.training and (getattr(attn, 'key_drop', 0.0) or getattr(attn, 'attn_drop', 0.0))):
        return None
    if isinstance(block, TimmBlock):
        return float(attn.scale)
    return attn.scale if type(attn) is TokenAttention and attn.softmax is None else None
