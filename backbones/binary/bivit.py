"""BiViT: Extremely Compressed Binary Vision Transformers, arXiv 2211.07091.

Written from the paper and the facts of the authors' modules, https://github.com/ThisisBillhe/BiViT (no licence file is
named for the two published modules' weights; there are none). Attention is binary throughout: inputs and weights of its
linear layers, queries, keys, values and the attention map. Weights of MLPs are binary, their inputs are not by default.
The paper binarizes attention and MLPs one after the other: `set_binary` switches each. With `residual_rank` attention
also gets BiPFT's estimates of what it loses (`residuals`). Differs: windows, position biases and padding are ours, as
the authors published the modules alone; scales start at conversion instead of at the first batch.
"""

# B batch, H W size of the map, N tokens, C channels, h heads, d head width
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Attention, RelativePositionBias, TokenAttention
from ..swin import WindowAttention
from .layers import BinaryLinear, BinaryProduct
from .replace import attentions, refuse, replace_attention, replace_linears
from .residuals import ResidualEstimator
from .windows import in_windows

PARTS = ('attention', 'mlp', 'merging')


class BinaryAttention(nn.Module):
    """Attention of binary queries, keys and values between the tokens of a group; the base of the layers below.

    Args:
        qkv, proj: the layers of a trained attention.
        num_heads: divides the width.
        scale: of the products; d ** -0.5 if None.
        layer: makes a binary layer of a linear one.
        map, threshold: see `BinaryProduct`.
        residual_rank: rank of BiPFT's estimates; 0 leaves them out.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        *,
        num_heads: int,
        scale: float | None,
        layer: Any,
        map: str,
        threshold: float,
        residual_rank: int,
    ):
        super().__init__()
        self.num_heads, self.width = num_heads, qkv.out_features // 3
        self.qkv, self.proj = layer(qkv), layer(proj)
        scale = (self.width // num_heads) ** -0.5 if scale is None else scale
        self.product = BinaryProduct(scale=scale, map=map, threshold=threshold)
        residual = ResidualEstimator(qkv.in_features, residual_rank) if residual_rank else None
        self.residual = None if residual is None else residual.to(qkv.weight.device, qkv.weight.dtype)

    def factors(self, x: Tensor) -> Tensor:
        """(..., C) -> queries, keys and values and the residuals' factors, (..., 3 C or more)."""
        qkv = self.qkv(x)
        return qkv if self.residual is None else torch.cat([qkv, self.residual(x)], -1)

    def outside(self) -> Tensor:
        """The factors of positions that hold zeros: the sign of 0 is 0."""
        assert self.qkv.bias is not None
        return self.qkv.bias if self.residual is None else torch.cat([self.qkv.bias, self.residual.outside()])

    def attend(self, factors: Tensor, bias: Tensor | None) -> Tensor:
        """(..., N, 3 C or more) -> (..., N, C); bias broadcast to (..., h, N, N)."""
        qkv = factors[..., : 3 * self.width].unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (t.transpose(-3, -2) for t in qkv.unbind(-3))
        residual = None if self.residual is None else self.residual.terms(factors[..., 3 * self.width :])
        return self.product(query, key, value, bias, residual).transpose(-3, -2).flatten(-2)

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Estimates that the weights lack start as they are here."""
        if self.residual is not None:
            for key, value in self.residual.state_dict().items():
                state.setdefault(f'{prefix}residual.{key}', value)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}'


class BinaryWindowAttention(BinaryAttention):
    """Of a map's windows, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, attention: WindowAttention, **options: Any):
        super().__init__(attention.qkv, attention.proj, num_heads=attention.num_heads, scale=None, **options)
        self.window_size, self.shift, self.always_shift = attention.window_size, attention.shift, attention.always_shift
        self.position_bias: RelativePositionBias = attention.position_bias

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        shift = self.shift
        if shift and not self.always_shift and min(H, W) <= self.window_size:
            shift = 0
        out = in_windows(
            self.factors(x), self.attend, self.window_size, shift, bias=self.position_bias(), outside=self.outside()
        )
        return self.proj(out)


class BinaryMapAttention(BinaryAttention):
    """Of all positions of a map, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, attention: Attention, **options: Any):
        super().__init__(attention.qkv, attention.proj, num_heads=attention.num_heads, scale=None, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.factors(x.flatten(1, 2)), None)).view(x.shape)


class BinaryTokenAttention(BinaryAttention):
    """Of tokens, (B, N, C) -> (B, N, C), with windows for the patches where the model has them."""

    def __init__(self, attention: TokenAttention, **options: Any):
        if attention.softmax is not None or attention.gate is not None or attention.key_drop or attention.attn_drop:
            raise ValueError(
                'bivit takes attention without clip, gate, key_drop and attn_drop; build the model without them'
            )
        super().__init__(attention.qkv, attention.proj, num_heads=attention.num_heads, scale=attention.scale, **options)
        self.prefix, self.window_size = attention.prefix, attention.window_size

    def forward(self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None) -> Tensor:
        """`grid` and `bias` as in `TokenAttention`."""
        factors = self.factors(x)
        if self.window_size is None:
            return self.proj(self.attend(factors, bias))
        if bias is not None:
            raise ValueError('windows take no bias: merged tokens lie on no grid')
        patches = factors[:, self.prefix :].unflatten(1, grid)
        out = in_windows(patches, self.attend, self.window_size).flatten(1, 2)
        if self.prefix:
            out = torch.cat((self.attend(factors, None)[:, : self.prefix], out), 1)
        return self.proj(out)


_ATTENTION: dict[type[nn.Module], type[BinaryAttention]] = {
    WindowAttention: BinaryWindowAttention,
    TokenAttention: BinaryTokenAttention,
    Attention: BinaryMapAttention,
}


def bivit(
    model: nn.Module,
    *,
    parts: Sequence[str] = ('attention', 'mlp'),
    attention_input: str = 'sign',
    mlp_input: str = 'float',
    scale: str = 'learned',
    map: str = 'softmax',
    threshold: float = 0.25,
    residual_rank: int = 0,
) -> None:
    """Binarizes a model in place.

    Args:
        parts: what becomes binary, of 'attention', 'mlp' and 'merging', the layers between stages. The first and the
            last layer stay as they are.
        attention_input, mlp_input: inputs of the layers of attention, and of MLPs and merging: 'sign', 'elastic' or
            'float', see `BinaryLinear`. The authors' modules of MLPs keep them floating point.
        scale: of weights, 'learned' or 'mean'.
        map, threshold: of the attention map, see `BinaryProduct`.
        residual_rank: rank of BiPFT's low-rank estimates of what attention loses; 0 leaves them out.

    Raises:
        ValueError: an argument is not allowed, or the model has nothing to binarize.
    """
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    if not parts or any(part not in PARTS for part in parts):
        raise ValueError(f'parts must be some of {", ".join(PARTS)}, got {parts=}')
    if residual_rank < 0:
        raise ValueError(f'residual_rank must not be negative, got {residual_rank=}')
    if 'attention' in parts:
        refuse('bivit', model, _ATTENTION)
        layer = partial(_layer, part='attention', input=attention_input, scale=scale)
        options = dict(layer=layer, map=map, threshold=threshold, residual_rank=residual_rank)
        for place in attentions(model):
            replace_attention(place, _ATTENTION[type(place.module)](place.module, **options))  # type: ignore[arg-type]
    for part, name in (('mlp', 'mlp'), ('merging', 'downsample_layers')):
        if part in parts:
            make = partial(_layer, part=part, input=mlp_input, scale=scale)
            count = sum(replace_linears(branch, make) for branch in _branches(model, name))
            if not count:
                raise ValueError(
                    f'{type(model).__name__} has no linear layers for part {part!r}; leave it out of parts'
                )


def set_binary(model: nn.Module, part: str, enable: bool = True, *, restart: bool = False) -> None:
    """Switches a part of a binarized model between its binary form and the floating-point one that it came from.

    Both share weights, so attention and MLPs can be binarized one after the other in one training.

    Args:
        part: 'attention', 'mlp' or 'merging'.
        restart: learned scales start again at the mean weight of their rows, for weights that were trained meanwhile.

    Raises:
        ValueError: no such part.
    """
    found = [module for module in model.modules() if isinstance(module, BinaryLinear) and module.part == part]
    if not found:
        raise ValueError(f'the model has no binary part {part!r}; it has {", ".join(parts_of(model)) or "none"}')
    for module in model.modules():
        if isinstance(module, BinaryProduct) and part == 'attention':
            module.active = enable
    for module in found:
        module.active = enable
        if restart:
            module.restart_scale()


def parts_of(model: nn.Module) -> tuple[str, ...]:
    """The parts of a model that are binary layers, in the order of `PARTS`."""
    found = {module.part for module in model.modules() if isinstance(module, BinaryLinear)}
    return tuple(part for part in PARTS if part in found)


def _layer(linear: nn.Linear, *, part: str, input: str, scale: str) -> BinaryLinear:
    layer = BinaryLinear.from_linear(linear, input=input, scale=scale)
    layer.part = part
    return layer


def _branches(model: nn.Module, name: str) -> list[nn.Module]:
    """Submodules that are called so; of the layers between stages, all but the stem."""
    found = [module for path, module in model.named_modules() if path.rsplit('.', 1)[-1] == name]
    return found if name == 'mlp' else [layer for layers in found for layer in list(layers.children())[1:]]
