"""Activator: GLU Activation Function as the Core Component of a Vision Transformer, arXiv 2405.15953.

Written from the paper and the facts of the authors' code, https://github.com/Abdullah-88/Activator (BSD-3-Clause; no
weights were published): a gated unit in place of attention, with or without the MLP after it. Nothing in it mixes
tokens: each patch is seen alone until the mean of all is taken, and maps of the dense form see their patch alone up to
the pyramid. Two layers share one norm where the authors' share theirs. Our reading: the model of 224 pixels, in DeiT's
shape, since the paper's are of 32. The dense form is ours.
"""

# B batch, N tokens, C channels, H W size of the grid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .backbone import rename
from .layers import ACTIVATIONS, ConvDownsample, Mlp, build_token_mixer, drop_path_schedule, norm_factory
from .layers.linear import Linear
from .layers.lookup import choose
from .layers.norm import NormFactory
from .layers.token_attention import TOKEN_MIXERS
from .plain import Plain, check_plain
from .registry import register, weights
from .sizes import AnySize, FixedSize


class GatedUnit(nn.Module):
    """proj_3(norm(act(proj_1(x))) * norm(proj_2(x))) with one norm for both factors, per token; (B, N, C) -> the same.

    Args:
        dim: channels.
        mlp_ratio: width of the factors over dim.
        act: 'gelu' (GEGLU), 'silu' (SwiGLU), 'relu' (ReGLU) or another activation by name.
    """

    last_linear: ClassVar[str] = 'proj_3'
    first_linears: ClassVar[tuple[str, ...]] = ('proj_1', 'proj_2')

    def __init__(self, *, dim: int, mlp_ratio: float = 2.0, act: str = 'gelu'):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.proj_1 = Linear(dim, hidden)
        self.proj_2 = Linear(dim, hidden)
        self.proj_3 = Linear(hidden, dim)
        self.act = choose('act', act, ACTIVATIONS)()
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return self.proj_3(self.norm(self.act(self.proj_1(x))) * self.norm(self.proj_2(x)))


TOKEN_MIXERS['glu'] = GatedUnit


class DroppedMlp(Mlp):
    """An MLP with dropout after both layers."""

    def __init__(self, *, dim: int, ratio: float, drop: float):
        super().__init__(dim=dim, ratio=ratio)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.act(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(x), self.drop, self.training)


class ActivatorBlock(nn.Module):
    """x = x + attn(norm(x)), then x = x + mlp(norm(x)) with the same norm, if there is an MLP.

    Args:
        dim: channels.
        norm: makes a normalisation for a number of channels.
        attn: what stands for attention, (x, grid) -> (B, N, C).
        mlp: channel MLP or None.
        drop_path: probability of dropping a branch for an image while training.
    """

    def __init__(self, *, dim: int, norm: NormFactory, attn: nn.Module, mlp: nn.Module | None, drop_path: float = 0.0):
        super().__init__()
        self.norm = norm(dim)
        self.attn = attn
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm(x), grid))
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm(x)))


class Activator(Plain):
    """Patches, gated units and MLPs, and the mean of all tokens; no positions, no norm after the blocks.

    Args:
        depth, dim: blocks and channels.
        patch_size: pixels of a patch's side, and their stride.
        mlp_ratio: width of the gated units and of the MLPs over dim.
        feed_forward: have an MLP after each gated unit.
        act: activation of the gated units, by name.
        mlp_drop: dropout in the MLPs, 0.5 in the authors' training.
        num_heads: for a token mixer with heads.
        token_mixer: by name or dict(name=..., option=...), 'glu' or another one of `layers.token_attention`.
        norm: normalisation before both branches, by name.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: not needed, any size is taken.
        The others: see `Plain.assemble`.
    """

    sizes: AnySize | FixedSize = AnySize()
    reduced: ClassVar[dict[str, Any]] = {**Plain.reduced, 'depth': 3}

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 192,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        feed_forward: bool = True,
        act: str = 'gelu',
        mlp_drop: float = 0.0,
        num_heads: int = 3,
        token_mixer: str | Mapping[str, Any] = 'glu',
        norm: str = 'layer_eps5',
        pyramid_dim: int | None = None,
        pyramid_blocks: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        check_plain(depth=depth, dim=dim, patch_size=patch_size)
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=ConvDownsample(in_chans, dim, kernel=patch_size, stride=patch_size, padding=0, image=True),
            position=None,
            prefix=(),
            blocks=[
                ActivatorBlock(
                    dim=dim,
                    norm=norm_factory(norm),
                    attn=build_token_mixer(token_mixer, dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio, act=act),
                    mlp=DroppedMlp(dim=dim, ratio=mlp_ratio, drop=mlp_drop) if feed_forward else None,
                    drop_path=rate,
                )
                for rate in drop_path_schedule([depth], drop_path_rate)[0]
            ],
            norm=lambda dim: nn.Identity(),
            pooling='avg',
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )

    def init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, as the authors'."""

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'patcher\.', 'patch_embed.conv.'),
    (r'classifier\.', 'head.'),
    (r'model\.(\d+)\.norm\.', r'blocks.\1.norm.'),
    (r'model\.(\d+)\.actgu\.', r'blocks.\1.attn.'),
    (r'model\.(\d+)\.ffn\.net\.0\.', r'blocks.\1.mlp.fc1.'),
    (r'model\.(\d+)\.ffn\.net\.3\.', r'blocks.\1.mlp.fc2.'),
]


def _weights(tag: str, params: float, **cfg: Any) -> list[Any]:
    """A model without published weights; params are counted."""
    return [
        weights(
            tag,
            None,
            top1=None,
            params=params,
            macs=None,
            paper='https://arxiv.org/abs/2405.15953',
            origin='https://github.com/Abdullah-88/Activator',
            licence='bsd-3-clause',
            first_conv='patch_embed.conv',
            **cfg,
        )
    ]


_CIFAR: dict[str, Any] = {
    'size': 32,
    'crop_pct': 1.0,
    'num_classes': 10,
    'mean': (0.5, 0.5, 0.5),
    'std': (0.5, 0.5, 0.5),
}
_PAPER: dict[str, Any] = {'depth': 4, 'dim': 256, 'patch_size': 4, 'mlp_ratio': 2}

# CIFAR-10 and CIFAR-100 in the paper: 73.2 and 46.1 for the gated units alone
register('activator_cifar_patch4', Activator, weights=_weights('cifar10', 2.65, **_CIFAR), **_PAPER)
register(
    'activator_geglu_cifar_patch4', Activator, feed_forward=False, weights=_weights('cifar10', 1.6, **_CIFAR), **_PAPER
)
register('activator_tiny_patch16', Activator, depth=12, dim=192, weights=_weights('in1k', 9.2))
