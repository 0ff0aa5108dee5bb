"""SReT: Sliced Recursive Transformer, arXiv 2111.05297.

Written from the paper and the facts of the authors' code, https://github.com/szq0214/SReT (MIT; the weights carry the
same licence). Differs: other image sizes than the one that positions were made for are taken, by bicubic interpolation;
numbers of tokens that slices do not divide give a shorter last slice. Stochastic depth rises to its full rate over the
distinct blocks, where the authors' stops at the rate of the last stage's third run. The authors draw the permutation of
the second run in evaluation too, so that their logits differ from call to call; here it is drawn in training alone,
unless `permute='always'`. The dense form is ours, see stride8.py.
"""

# B batch, N tokens, C channels, H W size of the map, h heads, G slices, M tokens of a slice
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .layers import Mlp, drop_path_schedule, norm_factory
from .layers.fold_norm import fold_into_previous
from .layers.grid import ceil_div, grid_of, to_first, to_last
from .layers.linear import Linear
from .layers.lookup import choose
from .layers.norm import NormFactory
from .layers.positions import PositionTable
from .registry import register, weights
from .sizes import Resampled
from .skeleton import check_stages, per_stage, rename
from .stride8 import FromStride8

LOOPS = 2  # runs of each block, in all published models and in the names of their weights
PERMUTE = {'train': (True, False), 'always': (True, True), 'never': (False, False)}  # in training, in evaluation


class SlicedAttention(nn.Module):
    """Self-attention within G slices of consecutive tokens, (B, N, C) -> (B, N, C); with `permuted`, of tokens in a
    random order that all images share.

    Args:
        dim: channels.
        num_heads: divides dim.
    """

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'num_heads must divide dim, got {num_heads=}, {dim=}')
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, slices: int = 1, permuted: bool = False) -> Tensor:
        if slices == 1:
            return self.proj(self._attend(self.qkv(x)))
        if not permuted:
            return self.proj(self._in_slices(self.qkv(x), slices))
        order = torch.randperm(x.shape[1], device=x.device)
        out = self._in_slices(self.qkv(x[:, order]), slices)
        return self.proj(out[:, order.argsort()])

    def _in_slices(self, qkv: Tensor, slices: int) -> Tensor:
        B, N, C3 = qkv.shape
        size = ceil_div(N, slices)
        total = size * slices
        mask = None
        if not (isinstance(N, int) and total == N):  # symbolic numbers always take the mask: one graph for all
            qkv = F.pad(qkv, (0, 0, 0, total - N))
            inside = (torch.arange(total, device=qkv.device) < N).view(slices, size)
            seen = inside | ~inside.any(1, keepdim=True)  # slices of nothing else attend to padding, and are cut off
            bias = torch.zeros_like(seen, dtype=qkv.dtype).masked_fill(~seen, float('-inf'))
            mask = bias.expand(B, -1, -1).reshape(B * slices, 1, 1, size)
        out = self._attend(qkv.reshape(B * slices, size, C3), mask).reshape(B, total, C3 // 3)
        if mask is None:
            return out
        # a copy always: whether one is needed depends on the number of tokens, which may be symbolic
        return out[:, :N].clone(memory_format=torch.contiguous_format)

    def _attend(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


class SReTBlock(nn.Module):
    """x = a x + b drop(attn(norm(x))), then the same with the MLP; a, b are learnable numbers. (B, N, C) both ways."""

    def __init__(self, *, dim: int, num_heads: int, norm: NormFactory, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = SlicedAttention(dim=dim, num_heads=num_heads)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim=dim, ratio=mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.coefficient1 = nn.Parameter(torch.ones(1))
        self.coefficient2 = nn.Parameter(torch.ones(1))
        self.coefficient3 = nn.Parameter(torch.ones(1))
        self.coefficient4 = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, slices: int, permuted: bool) -> Tensor:
        branch = self.drop_path(self.attn(self.norm1(x), slices, permuted))
        x = self.coefficient1 * x + self.coefficient2 * branch
        return self.coefficient3 * x + self.coefficient4 * self.drop_path(self.mlp(self.norm2(x)))


class NonLinearProjection(nn.Module):
    """x = a x + b mlp(norm(x)): what tells the runs of a shared block apart. (B, N, C) both ways."""

    def __init__(self, *, dim: int, norm: NormFactory, mlp_ratio: float):
        super().__init__()
        self.norm1 = norm(dim)
        self.mlp = Mlp(dim=dim, ratio=mlp_ratio)
        self.coefficient1 = nn.Parameter(torch.ones(1))
        self.coefficient2 = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficient1 * x + self.coefficient2 * self.mlp(self.norm1(x))


class Recursion(nn.Module):
    """One block run twice, each run followed by a projection of its own; (B, H, W, C) -> (B, H, W, C).

    Args:
        slices: of the first and of the second run; 1 attends to all tokens.
        permute: 'train', 'always' or 'never': when the second run slices a random order.
        The others: see `SReT`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        slices: Sequence[int],
        permute: str,
        norm: NormFactory,
        mlp_ratio: float,
        projection_ratio: float,
        drop_path: float,
    ):
        super().__init__()
        self.slices, self.permute = tuple(slices), choose('permute', permute, PERMUTE)
        self.block = SReTBlock(dim=dim, num_heads=num_heads, norm=norm, mlp_ratio=mlp_ratio, drop_path=drop_path)
        self.projections = nn.ModuleList(
            NonLinearProjection(dim=dim, norm=norm, mlp_ratio=projection_ratio) for _ in slices
        )

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        permuted = self.permute[0] if self.training else self.permute[1]
        x = x.flatten(1, 2)
        for run, (slices, project) in enumerate(zip(self.slices, self.projections)):
            x = project(self.block(x, slices, permuted and run > 0))
        return x.unflatten(1, grid)

    def extra_repr(self) -> str:
        return f'slices={self.slices}'


class ConvStem(nn.Module):
    """Three convolutions of stride 2 with batch norm and ReLU, and positions; (B, C, H, W) -> (B, H/8, W/8, dim)."""

    def __init__(self, in_chans: int, dim: int, *, grid: tuple[int, int]):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2)
        self.conv2, self.bn2 = nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim)
        self.conv3, self.bn3 = nn.Conv2d(dim, dim, 3, 2, 1), nn.BatchNorm2d(dim)
        self.pos_embed = PositionTable(dim, grid, method='bicubic')

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = to_last(x)
        grid = (x.shape[1], x.shape[2])
        return x + self.pos_embed(grid)[1].unflatten(1, grid)

    def for_deploy(self) -> nn.Module:
        """The same layer in evaluation mode, with batch norms inside the convolutions."""
        for i in range(1, 4):
            setattr(self, f'bn{i}', fold_into_previous(getattr(self, f'conv{i}'), getattr(self, f'bn{i}')))
        return self


class DepthwiseDownsample(nn.Module):
    """A 3x3 convolution of stride 2 in which every channel gives dim / in_dim channels; maps (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        if dim % in_dim:
            raise ValueError(f'dims must be multiples of those before them, got {dim} after {in_dim}')
        self.conv = nn.Conv2d(in_dim, dim, 3, 2, 1, groups=in_dim)

    def forward(self, x: Tensor) -> Tensor:
        return to_last(self.conv(to_first(x)))


class SReT(FromStride8):
    """Blocks that run twice, with attention in slices, in three stages of strides 8, 16 and 32.

    Args:
        depths, dims: distinct blocks and channels of each stage.
        num_heads: attention heads of each stage.
        first_slices, second_slices: slices that tokens attend within in a block's first and second run, per stage.
        permute: 'train', 'always' or 'never': when the second run slices a random order of the tokens. The authors'
            code does so always.
        mlp_ratio, projection_ratio: width of the MLPs of blocks and of projections over their channels.
        norm: normalisation throughout, by name.
        img_size: height and width that positions are made for, 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='positions bicubically')
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 1),
        'dims': (16, 32, 32),
        'num_heads': (1, 2, 2),
        'permute': 'never',
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 5, 3),
        dims: Sequence[int] = (64, 128, 256),
        num_heads: int | Sequence[int] = (2, 4, 8),
        first_slices: int | Sequence[int] = (8, 4, 1),
        second_slices: int | Sequence[int] = (2, 1, 1),
        permute: str = 'train',
        mlp_ratio: float = 4.0,
        projection_ratio: float = 1.0,
        norm: str = 'layer',
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        depths, dims = check_stages(depths, dims, 3)
        make_norm = norm_factory(norm)
        slices = [per_stage(*named, 3) for named in (('first_slices', first_slices), ('second_slices', second_slices))]
        stages = [
            [
                Recursion(
                    dim=dim,
                    num_heads=heads,
                    slices=runs,
                    permute=permute,
                    norm=make_norm,
                    mlp_ratio=mlp_ratio,
                    projection_ratio=projection_ratio,
                    drop_path=rate,
                )
                for rate in rates
            ]
            for dim, heads, runs, rates in zip(
                dims, per_stage('num_heads', num_heads, 3), zip(*slices), drop_path_schedule(depths, drop_path_rate)
            )
        ]
        self.assemble_from_8(
            dims=dims,
            downsamplings=[
                ConvStem(in_chans, dims[0], grid=grid_of(img_size, 8)),
                *(DepthwiseDownsample(before, dim) for before, dim in itertools.pairwise(dims)),
            ],
            stages=stages,
            norm=make_norm,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def no_weight_decay(self) -> set[str]:
        return {'downsample_layers.0.pos_embed.table'}

    def init_weights(self, module: nn.Module) -> None:
        """Positions, truncated normal with deviation 0.02; layers keep PyTorch's own initialisation, as theirs do."""
        if isinstance(module, PositionTable):
            nn.init.trunc_normal_(module.table, std=0.02)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, which list a block once for each of its runs."""
        state = rename(state, _RENAMES)
        for s in range(3):
            start = f'transformers.{s}.blocks.'
            for key in [key for key in state if key.startswith(start)]:
                position, rest = key.removeprefix(start).split('.', 1)
                block, run = divmod(int(position) // 2, LOOPS)
                part = f'projections.{run}' if int(position) % 2 else 'block'
                state[f'stages.{s}.{block}.{part}.{_coefficient(rest)}'] = state.pop(key)
        table = state.get('downsample_layers.0.pos_embed.table')
        if isinstance(table, Tensor) and table.ndim == 4:  # theirs is (1, C, H, W)
            state['downsample_layers.0.pos_embed.table'] = table.flatten(2).transpose(1, 2)
        return state


def _coefficient(key: str) -> str:
    """'coefficient1.bias' is a number of its own here."""
    return key.removesuffix('.bias') if key.startswith('coefficient') else key


_RENAMES = [
    (r'pos_embed$', 'downsample_layers.0.pos_embed.table'),
    (r'patch_embed\.', 'downsample_layers.0.'),
    (r'pools\.0\.', 'downsample_layers.1.'),
    (r'pools\.1\.', 'downsample_layers.2.'),
]

_DRIVE = 'https://drive.google.com/file/d/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2111.05297',
    'origin': 'https://github.com/szq0214/SReT',
    'licence': 'mit',
    'crop_pct': 0.875,
    'first_conv': 'downsample_layers.0.conv1',
}
_T: dict[str, Any] = {'dims': (64, 128, 256), 'num_heads': (2, 4, 8), 'mlp_ratio': 3.6}
_LT: dict[str, Any] = {'dims': (64, 128, 256), 'num_heads': (2, 4, 8), 'mlp_ratio': 4.0}
_S: dict[str, Any] = {
    'dims': (126, 252, 504),
    'num_heads': (3, 6, 12),
    'mlp_ratio': 3.0,
    'projection_ratio': 2.0,
}
_WHOLE: dict[str, Any] = {'first_slices': 1, 'second_slices': 1}


def _file(tag: str, drive: str | None, top1: float | None, params: float, macs: float, size: int = 224) -> Any:
    page = None if drive is None else f'{_DRIVE}{drive}/view'
    return weights(tag, None, top1=top1, params=params, macs=macs, page=page, size=size, **_PAPER)


register(
    'sret_t',
    SReT,
    drop_path=0.1,
    weights=[
        _file('in1k', '1FDTpva6y-I_bKmyVmLFDn_3BlDq3dwni', 76.0, 4.8, 1.1),
        _file('distill_in1k', '1xzG4VQyQyxWJfQTcGCE-fuMuK3BwPCjK', 77.6, 4.8, 1.1),
    ],
    **_T,
)
register(
    'sret_t_wo_slice',
    SReT,
    weights=[
        _file('in1k', '1wHM7NRSkz-WykCSES17xFV56h_m5RMXj', 76.1, 4.8, 1.4),
        _file('distill_in1k', '1P1qK-j1Cac5le8-DNUFBbjmIpRThuiVp', 77.7, 4.8, 1.4),
    ],
    **_T,
    **_WHOLE,
)
register(
    'sret_lt',
    SReT,
    drop_path=0.1,
    weights=[
        _file('in1k', '1uSWvoVLHmOH6rNYiXSxD_rlN5dSBvEm3', 76.7, 5.0, 1.2),
        _file('distill_in1k', '1l6u0q4kwli5czEyo4TeJANtqsulh-J5G', 77.7, 5.0, 1.2),
    ],
    **_LT,
)
register(
    'sret_lt_16_14_1',
    SReT,
    drop_path=0.1,
    first_slices=(16, 14, 1),
    second_slices=1,
    weights=[_file('in1k', '1sKW9KJ5PLkDVXcW6m7dp8ieLwyCJNRqV', 76.6, 5.0, 1.2)],
    **_LT,
)
register(
    'sret_lt_wo_slice',
    SReT,
    weights=[
        _file('in1k', '1EXwfiMMa1UVQ_tmY6YQJ-Se0b3bW5NpC', 76.8, 5.0, 1.4),
        _file('distill_in1k', '1FDqkfkw5nZEuTcBmiBKg3lvPJOPQWS6i', 77.9, 5.0, 1.4),
    ],
    **_LT,
    **_WHOLE,
)
register(
    'sret_s',
    SReT,
    drop_path=0.2,
    weights=[_file('in1k', '1y6F_bCgS1sagm7pxjAtuSPUB5HoNb8Ed', 81.9, 20.9, 4.2)],
    **_S,
)
register(
    'sret_s_wo_slice',
    SReT,
    drop_path=0.2,
    weights=[_file('in1k', '1vlsxJieKhfnw-F6xFiwczvXBuk7ugXxm', 82.0, 20.9, 4.7)],
    **_S,
    **_WHOLE,
)
register(
    'sret_t_wo_slice_finetune_384',
    SReT,
    img_size=384,
    weights=[_file('distill_in1k', '11mWAktu6LrNa0Qt61WJGA0eTWoKYD1Be', 79.7, 4.9, 6.4, 384)],
    **_T,
    **_WHOLE,
)
register(
    'sret_s_wo_slice_finetune_384',
    SReT,
    img_size=384,
    drop_path=0.2,
    weights=[_file('distill_in1k', '1z5whJpXbbtFdjLpS1pCPvKcJhVnYCeo-', 83.8, 21.0, 18.5, 384)],
    **_S,
    **_WHOLE,
)
register(
    'sret_s_wo_slice_finetune_512',
    SReT,
    img_size=512,
    drop_path=0.2,
    weights=[_file('distill_in1k', '1AZXIGMiGboI-nkoKuPnHnhDlBwZumuiB', 84.3, 21.3, 42.8, 512)],
    **_S,
    **_WHOLE,
)
