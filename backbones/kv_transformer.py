"""Key-Value Transformer: attention whose queries are its keys, arXiv 2305.19129.

Written from the paper and the facts of the author's code, https://github.com/aliborji/kv-transformer (GPL-3.0; no
weights were published). From there: scores scaled by dim ** -0.5 rather than by a head's width, keys and values without
bias, no norm after the last block, an MLP head, and, in the positional variant, a linear map from each score plus a 2-D
sinusoid of (query, key) to one number. Our reading: the models of 224 pixels, in DeiT's shapes, as the paper's are of
32. Differs: of that map only what softmax does not cancel is computed, see `KeyValueAttention`; other sizes are taken
by resizing positions. The dense form is ours.
"""

# B batch, N tokens, C channels, H W size of the grid, h heads, K classes
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import rename
from .layers import ConvDownsample, Mlp, TokenAttention, TokenBlock, build_token_mixer, drop_path_schedule, norm_factory
from .layers.grid import grid_of
from .layers.linear import Linear
from .layers.positions import PositionTable
from .layers.token_attention import TOKEN_MIXERS
from .plain import Plain, block_windows, check_plain
from .registry import register, weights
from .sizes import AnySize, FixedSize, Resampled

_ROWS, _COLUMNS = 26, 24  # of the 50 features of the 2-D sinusoid: those of the query's index, those of the key's


class SharedKeys(nn.Module):
    """(B, N, C) -> (B, N, 3C), ordered (k | k | v): a linear layer for keys, which are the queries too, and values."""

    def __init__(self, dim: int, bias: bool):
        super().__init__()
        self.kv = Linear(dim, 2 * dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        kv = self.kv(x)
        return torch.cat((kv[..., : kv.shape[-1] // 2], kv), -1)


class KeyValueAttention(TokenAttention):
    """out[i] = sum over j of softmax_j(dim ** -0.5 k[i] . k[j]) v[j]: a symmetric map before the softmax.

    With positions the scores s[i, j] become w . (s[i, j] + e(i, j)) + b, where e is a sinusoid of 26 features of i and
    24 of j, and w and b are learned. The terms of i and b are the same for all j, so softmax ignores them:
    p = softmax_j(sum(w) s[i, j] + w_j . e(j)) is the same for less work, and makes the map asymmetric.

    Args:
        positional: have w and b.
        qkv_bias: learn a bias of keys and values.
        The others: as in `TokenAttention`; windows take no positions.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        positional: bool = False,
        prefix: int = 0,
        qkv_bias: bool = False,
        window_size: int | None = None,
        clip: Mapping[str, float] | None = None,
        gate: str | None = None,
        key_drop: float = 0.0,
        attn_drop: float = 0.0,
    ):
        super().__init__(
            dim=dim,
            num_heads=num_heads,
            prefix=prefix,
            scale=dim**-0.5,
            window_size=window_size,
            clip=clip,
            gate=gate,
            key_drop=key_drop,
            attn_drop=attn_drop,
        )
        if positional and window_size is not None:
            raise ValueError(f'windows take no positions, got {positional=}, {window_size=}')
        self.qkv = SharedKeys(dim, qkv_bias)  # type: ignore[assignment]
        self.first_linears = ('qkv.kv',) if gate is None else ()
        self.map_pos = Linear(_ROWS + _COLUMNS, 1) if positional else None
        if self.map_pos is not None:
            self.map_pos.bias.requires_grad_(False)  # without effect, see above; kept for weights of the author's code

    @property
    def any_tokens(self) -> bool:
        return self.map_pos is None and super().any_tokens  # positions are those of the sequence

    def forward(
        self, x: Tensor, grid: tuple[int, int], bias: Tensor | None = None, outputs: int | None = None
    ) -> Tensor:
        if self.map_pos is not None:
            # of the batch's size, without a copy: broadcasting it would split exported programs at a batch of one
            positions = self.key_positions(x.shape[1]).expand(x.shape[0], -1, -1, -1)
            bias = positions if bias is None else positions + bias
        return super().forward(x, grid, bias, outputs)

    def key_positions(self, tokens: int) -> Tensor:
        """w_j . e(j) for the keys 0 to tokens - 1, (1, 1, 1, tokens)."""
        assert self.map_pos is not None
        weight = self.map_pos.weight[0, _ROWS:]
        frequency = 10000 ** (-torch.arange(0, _COLUMNS, 2, device=weight.device, dtype=torch.float32) / _ROWS)
        angle = torch.arange(tokens, device=weight.device, dtype=torch.float32)[:, None] * frequency
        return (angle.sin() * weight[::2] + angle.cos() * weight[1::2]).sum(-1)[None, None, None].to(weight.dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if self.map_pos is not None:
            query = query * self.map_pos.weight.sum().to(query.dtype)
        return super()._attend(query, key, value, bias)


TOKEN_MIXERS['key_value'] = KeyValueAttention


class GeluHead(nn.Module):
    """Linear, GELU, dropout, linear."""

    last: ClassVar[str] = 'fc2'

    def __init__(self, dim: int, num_classes: int, drop_rate: float, *, hidden: int):
        super().__init__()
        self.hidden_size = hidden
        self.fc1 = Linear(dim, hidden)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = Linear(hidden, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.gelu(self.fc1(x))
        return x if pre_logits else self.fc2(self.drop(x))


class KVTransformer(Plain):
    """A vision transformer whose attention shares one projection between queries and keys.

    Args:
        depth, dim: blocks and channels.
        num_heads: attention heads.
        patch_size: pixels of a patch's side, and their stride.
        mlp_ratio: width of the MLPs and of the head over dim.
        positional: scores depend on the keys' positions, see `KeyValueAttention`.
        token_mixer, window_size, global_blocks, pyramid_dim, pyramid_blocks, img_size: as in `DeiT`; 'attention' has
            queries.
        norm: normalisation before both branches, by name.
        The others: see `Plain.assemble`.
    """

    sizes: AnySize | FixedSize = Resampled(how='position tables bicubically')
    reduced: ClassVar[dict[str, Any]] = {**Plain.reduced, 'depth': 3}

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 192,
        num_heads: int = 3,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        positional: bool = False,
        token_mixer: str | Mapping[str, Any] = 'key_value',
        norm: str = 'layer_eps5',
        window_size: int | None = None,
        global_blocks: Sequence[int] | None = None,
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
        make_norm, hidden = norm_factory(norm), int(dim * mlp_ratio)
        rates = drop_path_schedule([depth], drop_path_rate)[0]
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=ConvDownsample(in_chans, dim, kernel=patch_size, stride=patch_size, padding=0, image=True),
            position=PositionTable(dim, grid_of(img_size, patch_size), prefix=1, method='bicubic'),
            prefix=('cls_token',),
            blocks=[
                TokenBlock(
                    dim=dim,
                    norm=make_norm,
                    attn=build_token_mixer(
                        token_mixer,
                        dim=dim,
                        num_heads=num_heads,
                        prefix=1,
                        qkv_bias=False,
                        window_size=window,
                        positional=positional,
                    ),
                    mlp=Mlp(dim=dim, ratio=mlp_ratio),
                    drop_path=rate,
                )
                for window, rate in zip(block_windows(depth, window_size, global_blocks), rates)
            ],
            norm=lambda dim: nn.Identity(),
            pooling='token',
            head=lambda dim, classes, drop: GeluHead(dim, classes, drop, hidden=hidden),
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)
        self.init_prefix()

    def init_weights(self, module: nn.Module) -> None:
        """Positions are standard normal, as the author's; other layers keep PyTorch's own initialisation."""
        if isinstance(module, PositionTable):
            nn.init.normal_(module.table)

    def init_prefix(self) -> None:
        """The class token, standard normal."""
        nn.init.normal_(self.get_parameter('cls_token'))

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the author's names."""
        return rename(state, _RENAMES)

    def resample(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Patches as a convolution, where they come as a linear layer of inputs ordered (row, column, colour)."""
        weight = state.get('patch_embed.conv.weight')
        if weight is not None and weight.ndim == 2 and weight.shape[1] % self.stride**2 == 0:
            squares = weight.reshape(len(weight), self.stride, self.stride, -1)
            state['patch_embed.conv.weight'] = squares.permute(0, 3, 1, 2).contiguous()
        return super().resample(state)


_RENAMES = [
    (r'pos_embedding$', 'pos_embed.table'),
    (r'patch_to_embedding\.', 'patch_embed.conv.'),
    (r'mlp_head\.0\.', 'head.fc1.'),
    (r'mlp_head\.2\.', 'head.fc2.'),
    (r'model\.layers\.(\d+)\.0\.fn\.fn\.to_kv\.', r'blocks.\1.attn.qkv.kv.'),
    (r'model\.layers\.(\d+)\.0\.fn\.fn\.to_out\.', r'blocks.\1.attn.proj.'),
    (r'model\.layers\.(\d+)\.0\.fn\.fn\.map_pos\.', r'blocks.\1.attn.map_pos.'),
    (r'model\.layers\.(\d+)\.1\.fn\.fn\.net\.0\.', r'blocks.\1.mlp.fc1.'),
    (r'model\.layers\.(\d+)\.1\.fn\.fn\.net\.2\.', r'blocks.\1.mlp.fc2.'),
    (r'model\.layers\.(\d+)\.0\.fn\.norm\.', r'blocks.\1.norm1.'),
    (r'model\.layers\.(\d+)\.1\.fn\.norm\.', r'blocks.\1.norm2.'),
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
            paper='https://arxiv.org/abs/2305.19129',
            origin='https://github.com/aliborji/kv-transformer',
            licence='gpl-3.0',
            classifier='head.fc2',
            first_conv='patch_embed.conv',
            **cfg,
        )
    ]


_CIFAR: dict[str, Any] = {
    'size': 32,
    'crop_pct': 1.0,
    'num_classes': 10,
    'mean': (0.4914, 0.4822, 0.4465),
    'std': (0.247, 0.2435, 0.2616),
}
_PAPER: dict[str, Any] = {
    'depth': 4,
    'dim': 128,
    'num_heads': 4,
    'mlp_ratio': 1,
    'patch_size': 8,
    'img_size': 32,
}
_TINY: dict[str, Any] = {'depth': 12, 'dim': 192, 'num_heads': 3}

register('kvt_cifar_patch8', KVTransformer, weights=_weights('cifar10', 0.376, **_CIFAR), **_PAPER)
register('kvt_pos_cifar_patch8', KVTransformer, positional=True, weights=_weights('cifar10', 0.376, **_CIFAR), **_PAPER)
register('kvt_tiny_patch16', KVTransformer, weights=_weights('in1k', 6.0), **_TINY)
register('kvt_pos_tiny_patch16', KVTransformer, positional=True, weights=_weights('in1k', 6.0), **_TINY)
