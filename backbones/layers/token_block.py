"""The block of plain backbones: two residual branches on tokens, and what published variants add to them."""

# B batch, N tokens, C channels, H W size of the grid
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ...kernels.dispatch import inferring
from .fold_norm import fold_into_next
from .norm import NormFactory
from .scale import Scale, fold_scale
from .token_attention import TokenAttention


class TokenBlock(nn.Module):
    """x = x + s * drop(attn(norm1(x))), then the same with mlp and norm2; (B, N, C) -> (B, N, C).

    The two halves are methods of their own, so that tokens can be merged between them.

    Args:
        dim: channels.
        norm: makes a normalisation for a number of channels.
        attn: token mixer, (x, grid) -> (B, N, C); one that knows `bias` also takes what is added to its logits.
        mlp: channel MLP on the last dimension.
        drop_path: probability of dropping a branch for an image while training.
        layer_scale: start value of a learnable s per channel; None leaves it out.
    """

    def __init__(
        self,
        *,
        dim: int,
        norm: NormFactory,
        attn: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)
        self.layer_scale1 = Scale(dim, init=layer_scale) if layer_scale is not None else None
        self.layer_scale2 = Scale(dim, init=layer_scale) if layer_scale is not None else None

    @property
    def prefix_alone(self) -> bool:
        """Whether `outputs` can be asked for."""
        return isinstance(self.attn, TokenAttention) and self.attn.window_size is None

    def forward(
        self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None, outputs: int | None = None
    ) -> Tensor:
        """`bias` and `outputs` as in `TokenAttention`."""
        if outputs is not None:
            branch = self.attn(self.norm1(x), grid, bias, outputs)
            return self.mix_channels(self._add(x[:, :outputs], branch, self.layer_scale1))
        return self.mix_channels(self.mix_tokens(x, grid, bias))

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None) -> Tensor:
        """The first half; `bias` as in `TokenAttention`."""
        branch = self.attn(self.norm1(x), grid) if bias is None else self.attn(self.norm1(x), grid, bias)
        return self._add(x, branch, self.layer_scale1)

    def mix_channels(self, x: Tensor) -> Tensor:
        """The second half."""
        return self._add(x, self.mlp(self.norm2(x)), self.layer_scale2)

    # ---- the first half in its steps, see `backbones.reduction.interface`

    @property
    def any_tokens(self) -> bool:
        return getattr(self.attn, 'any_tokens', False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.split(self.norm1(x))  # type: ignore[operator]

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn.query_key(self.norm1(x))  # type: ignore[operator]

    def value(self, x: Tensor) -> Tensor:
        return self.attn.value(self.norm1(x))  # type: ignore[operator]

    def weigh(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.attn.weigh(query, key, bias)  # type: ignore[operator]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.attn.attend(query, key, value, bias)  # type: ignore[operator]

    def join(self, x: Tensor, out: Tensor) -> Tensor:
        normed = self.norm1(x) if getattr(self.attn, 'gate', None) is not None else x
        return self._add(x, self.attn.join(out, normed), self.layer_scale1)  # type: ignore[operator]

    def for_deploy(self) -> nn.Module:
        """The same block in evaluation mode: layer scales inside the last linear layers of their branches, norms that
        are affine inside the first."""
        self.norm1 = fold_into_next(self.norm1, self.attn)
        self.norm2 = fold_into_next(self.norm2, self.mlp)
        self.layer_scale1 = fold_scale(self.attn, self.layer_scale1)
        self.layer_scale2 = fold_scale(self.mlp, self.layer_scale2)
        return self

    def _add(self, x: Tensor, branch: Tensor, scale: Scale | None) -> Tensor:
        branch = self.drop_path(branch)
        if scale is not None:
            return torch.addcmul(x, branch, scale.scale)  # one pass over memory instead of two
        in_place = inferring() and branch.dtype == x.dtype
        # allocating tokens costs more than the sum
        return branch.add_(x) if in_place and branch is not x else x + branch
