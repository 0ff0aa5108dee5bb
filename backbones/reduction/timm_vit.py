"""timm's vision transformers with fewer tokens: their blocks' parts, and the model that runs them.

`forward_features` and `forward_intermediates` are the two places where timm runs blocks; a reduced model is of a
subclass that runs them there through `reduction`. Everything else is timm's own.
"""

# B batch, N tokens, P of them prefix tokens, C channels, h heads, d head width
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..layers.token_attention import biased, linear_rows, scaled_products, split_heads
from .interface import Reduction, TokenModel, Tokens


class TimmBlock:
    """The parts of timm's pre-norm block, as `interface.Block` names them."""

    def __init__(self, block: Any):
        self.block = block

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.block.attn
        query, key, value = split_heads(attn.qkv(self.block.norm1(x)), attn.num_heads, 3)
        return attn.q_norm(query), attn.k_norm(key), value

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attn = self.block.attn
        query, key = split_heads(linear_rows(attn.qkv, self.block.norm1(x), 0, 2), attn.num_heads, 2)
        return attn.q_norm(query), attn.k_norm(key)

    def value(self, x: Tensor) -> Tensor:
        attn = self.block.attn
        return split_heads(linear_rows(attn.qkv, self.block.norm1(x), 2, 3), attn.num_heads, 1)[0]

    def weigh(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = scaled_products(query, key, self.block.attn.scale)
        return self.block.attn.attn_drop(biased(logits, bias).softmax(-1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        attn = self.block.attn
        drop = attn.attn_drop.p if attn.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, bias, dropout_p=drop, scale=attn.scale)

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        block, attn = self.block, self.block.attn
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if attn.gate is not None:
            out = out * attn.gate(block.norm1(x)).sigmoid()
        return x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))

    def mix_channels(self, x: Tensor) -> Tensor:
        block = self.block
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def describe_timm(model: Any) -> TokenModel:
    """What a method knows of a model of timm's.

    Raises:
        ValueError: it is no vision transformer, or one with blocks of another kind.
    """
    if type(model) not in REDUCED:
        raise ValueError(
            f'{type(model).__name__} has no sequence of tokens to reduce; reduce_tokens takes plain backbones of '
            f"densezoo's and timm's {' and '.join(kind.__name__ for kind in REDUCED)}"
        )
    for i, block in enumerate(model.blocks):
        attention = type(getattr(block, 'attn', block))
        if type(block) is not Block or attention is not Attention:
            raise ValueError(
                f'block {i} of the model is a {type(block).__name__} with {attention.__name__}; reduce_tokens '
                "takes timm's Block with Attention"
            )
    names = ('cls_token', 'dist_token') if isinstance(model, VisionTransformerDistilled) else ('cls_token',)
    registers = model.num_prefix_tokens - (model.cls_token is not None) * len(names)
    prefix = (*(names if model.cls_token is not None else ()), *(f'reg_token {i}' for i in range(registers)))
    grid = tuple(model.patch_embed.grid_size)
    patch = model.patch_embed.patch_size
    return TokenModel(
        depth=len(model.blocks),
        dim=model.embed_dim,
        num_heads=model.blocks[0].attn.num_heads,
        prefix=prefix,
        grid=grid,
        image_size=(grid[0] * patch[0], grid[1] * patch[1]),
        in_chans=model.patch_embed.proj.in_channels,
        blocks=lambda: [TimmBlock(block) for block in model.blocks],
    )


class _Reduced(VisionTransformer):
    reduction: Reduction

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])  # type: ignore[operator]
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), tuple(grid)  # type: ignore

    def _call(self, function: Any, *arguments: Any) -> Any:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _run(self, x: Tensor, track: bool, **limits: Any) -> tuple[Tokens, list[Tensor], tuple[int, int]]:
        x, grid = self._embed(x)
        blocks = [TimmBlock(block) for block in self.blocks]
        tokens, kept = self.reduction.run(blocks, x, grid, call=self._call, track=track, **limits)
        return tokens, kept, grid

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_masks(attn_mask, is_causal)
        return self.norm(self.reduction.restore(self._run(x, True)[0]))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_masks(attn_mask, is_causal)
        prefix_alone = self.attn_pool is None and self.global_pool == 'token'
        tokens = self._run(x, not prefix_alone, prefix_alone=prefix_alone)[0]
        return self.forward_head(self.norm(self.reduction.for_head(tokens, prefix_alone)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt must be NCHW or NLC, got {output_fmt=}')
        depth = len(self.blocks)
        wanted, last = feature_take_indices(depth, indices)
        tokens, kept, grid = self._run(x, True, wanted=wanted, last=last if stop_early else None)
        kept = [self.norm(each) if norm else each for each in kept]
        ahead = [each[:, : self.num_prefix_tokens] for each in kept]
        maps: list[Any] = [each[:, self.num_prefix_tokens :] for each in kept]
        if output_fmt == 'NCHW':
            maps = [each.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for each in maps]
        if output_dict:
            result = {'image_intermediates': maps}
            if return_prefix_tokens:
                result['image_intermediates_prefix'] = ahead
            if not intermediates_only:
                result['image_features'] = self.norm(self.reduction.restore(tokens))
            return result
        if return_prefix_tokens:
            maps = list(zip(maps, ahead))
        return maps if intermediates_only else (self.norm(self.reduction.restore(tokens)), maps)


class ReducedVisionTransformer(_Reduced):
    """timm's VisionTransformer with a `reduction`."""


class ReducedVisionTransformerDistilled(_Reduced, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled with a `reduction`."""


REDUCED = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedVisionTransformerDistilled,
}


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError('a model with fewer tokens takes neither attn_mask nor is_causal: masks are of all tokens')
