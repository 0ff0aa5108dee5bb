"""TinyViT: Fast Pretraining Distillation for Small Vision Transformers, arXiv 2207.10666.

Written from the paper and the facts of the authors' code, https://github.com/microsoft/Cream (folder TinyViT; MIT; the
weights carry the same licence). Key names inside blocks are the authors', with `conv` and `norm` for their `c` and
`bn`. Differs: every map keeps ceil(size / stride) positions; gradients reach the attention biases in evaluation mode
too. The authors published no dense form: ours returns the stages' raw maps.
"""

# B batch, C channels, H W size of the current stage, h heads, d head width, w window, N = w * w
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..kernels import linear, window_attention
from .layers import LayerNorm, Mlp, drop_path_schedule, mixer, norm_factory
from .layers.conv import ConvNorm
from .layers.grid import to_first, to_last
from .layers.linear import Linear
from .layers.norm import NormFactory
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage, rename


def absolute_offsets(window: int) -> Tensor:
    """(N, N) numbers |rows apart| * w + |columns apart| of each pair of positions of a window."""
    place = torch.arange(window)
    rows, columns = place.repeat_interleave(window), place.repeat(window)
    apart = [(axis[:, None] - axis[None, :]).abs() for axis in (rows, columns)]
    return apart[0] * window + apart[1]


@mixer('offset_window')
class OffsetWindowAttention(nn.Module):
    """Norm, then attention in windows with a bias per head and distance in rows and columns.

    Windows that leave the map are filled up with what a LayerNorm makes of zeros, and attend to it: the authors pad
    before they normalise. Under other norms what lies outside is masked. Maps (B, H, W, C) of any size.

    Args:
        num_heads: divides dim; dim // 32 (at least one) if None.
        window_size: side of the windows.
        norm: normalisation by name, or what makes it.
    """

    attention_bias_idxs: Tensor

    def __init__(
        self, *, dim: int, num_heads: int | None = None, window_size: int = 7, norm: str | NormFactory = 'layer_eps5'
    ):
        super().__init__()
        self.num_heads = max(dim // 32, 1) if num_heads is None else num_heads
        if self.num_heads < 1 or dim % self.num_heads:
            raise ValueError(f'num_heads must divide the channels, got num_heads={self.num_heads}, {dim=}')
        if window_size < 1:
            raise ValueError(f'window_size must be at least 1, got {window_size=}')
        self.window_size = window_size
        self.norm = norm_factory(norm)(dim) if isinstance(norm, str) else norm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(self.num_heads, window_size**2))
        self.register_buffer('attention_bias_idxs', absolute_offsets(window_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._by_role(self.qkv.weight), self._by_role(self.qkv.bias)
        out = window_attention(
            linear(self.norm(x), weight, bias),
            self.window_size,
            heads=self.num_heads,
            bias=self.attention_biases[:, self.attention_bias_idxs],
            outside=F.linear(self.norm.bias, weight, bias) if isinstance(self.norm, LayerNorm) else None,
        )
        return self.proj(out)

    def _by_role(self, rows: Tensor) -> Tensor:
        """Rows in the authors' order (head, q | k | v, d) in that of window attention, (q | k | v, head, d)."""
        return rows.unflatten(0, (self.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


class NormMlp(Mlp):
    """Norm, then the channel MLP."""

    def __init__(self, *, dim: int, ratio: float, norm: NormFactory):
        super().__init__(dim=dim, ratio=ratio, act='gelu')
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class TinyViTBlock(nn.Module):
    """Attention and MLP, each with its residual, and between them a 3x3 depthwise convolution without one."""

    def __init__(
        self, *, dim: int, num_heads: int, window_size: int, norm: NormFactory, mlp_ratio: float, drop_path: float
    ):
        super().__init__()
        self.attn = OffsetWindowAttention(dim=dim, num_heads=num_heads, window_size=window_size, norm=norm)
        self.local_conv = ConvNorm(dim, dim, kernel=3, groups=dim)
        self.mlp = NormMlp(dim=dim, ratio=mlp_ratio, norm=norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        x = to_last(self.local_conv(to_first(x)))
        return x + self.drop_path(self.mlp(x))


class MBConv(nn.Module):
    """Inverted convolution whose sum with its input is activated; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, *, dim: int, ratio: float, drop_path: float):
        super().__init__()
        wide = int(dim * ratio)
        self.conv1 = ConvNorm(dim, wide, act='gelu')
        self.conv2 = ConvNorm(wide, wide, kernel=3, groups=wide, act='gelu')
        self.conv3 = ConvNorm(wide, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv3(self.conv2(self.conv1(to_first(x))))
        return F.gelu(x + self.drop_path(to_last(branch)))


class Stem(nn.Module):
    """Two strided 3x3 convolutions, (B, C, H, W) -> (B, H, W, C) at stride 4."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim // 2, kernel=3, stride=2, act='gelu')
        self.conv2 = ConvNorm(dim // 2, dim, kernel=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return to_last(self.conv2(self.conv1(x)))


class PatchMerging(nn.Module):
    """1x1, strided 3x3 depthwise and 1x1 convolution, (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(in_dim, dim, act='gelu')
        self.conv2 = ConvNorm(dim, dim, kernel=3, stride=2, groups=dim, act='gelu')
        self.conv3 = ConvNorm(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return to_last(self.conv3(self.conv2(self.conv1(to_first(x)))))


class TinyViT(Hierarchical):
    """Convolution blocks in the first stage, window attention with a convolution inside the block in the others.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads: heads, one number for all stages or one per stage; the first stage has no attention.
        window_size: side of the windows, one for all stages or one per stage; the first stage has none.
        mlp_ratio: width of the MLPs over that of the stage.
        norm: normalisation of attention, MLPs and the head, by name; convolutions have BatchNorm.
        conv_ratio: the same of the first stage's convolutions.
        img_size: not needed, taken for the sake of a common interface.
        The others: see `Hierarchical.assemble`.
    """

    reduced = {
        'depths': (1, 1, 2, 1),
        'dims': (16, 32, 48, 64),
        'num_heads': (1, 2, 3, 4),
        'window_size': (7, 4, 3, 2),
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 160, 320),
        num_heads: int | Sequence[int] = (2, 4, 5, 10),
        window_size: int | Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        norm: str = 'layer_eps5',
        conv_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        depths, dims = check_stages(depths, dims)
        make_norm = norm_factory(norm)
        heads, windows = per_stage('num_heads', num_heads), per_stage('window_size', window_size)
        first, *others = drop_path_schedule(depths, drop_path_rate)
        stages: list[list[nn.Module]] = [[MBConv(dim=dims[0], ratio=conv_ratio, drop_path=rate) for rate in first]]
        stages += [
            [
                TinyViTBlock(dim=dim, num_heads=h, window_size=w, norm=make_norm, mlp_ratio=mlp_ratio, drop_path=rate)
                for rate in rates
            ]
            for dim, h, w, rates in zip(dims[1:], heads[1:], windows[1:], others)
        ]
        self.assemble(
            dims=dims,
            downsamplings=[Stem(in_chans, dims[0]), *(PatchMerging(a, b) for a, b in itertools.pairwise(dims))],
            stages=stages,
            output_norm=None,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers by a truncated normal; convolutions keep PyTorch's own; branches of MBConv start at zero."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)
        elif isinstance(module, MBConv):
            module.conv3.start_at_zero()

    def no_weight_decay(self) -> set[str]:
        """The attention biases."""
        return {name for name, _ in self.named_parameters() if name.endswith('attention_biases')}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names. The patch merging that ends a stage of theirs comes before the next of ours."""
        renamed = rename(state, _RENAMES)
        return {key.replace('.c.', '.conv.').replace('.bn.', '.norm.'): value for key, value in renamed.items()}


_RENAMES = [
    (r'patch_embed\.seq\.0\.', 'downsample_layers.0.conv1.'),
    (r'patch_embed\.seq\.2\.', 'downsample_layers.0.conv2.'),
    *((rf'layers\.{s}\.downsample\.', f'downsample_layers.{s + 1}.') for s in range(3)),
    (r'layers\.(\d+)\.blocks\.', r'stages.\1.'),
    (r'norm_head\.', 'norm.'),
]

_URL = 'https://github.com/wkcn/TinyViT-model-zoo/releases/download/checkpoints/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2207.10666',
    'origin': 'https://github.com/microsoft/Cream',
    'licence': 'mit',
    'first_conv': 'downsample_layers.0.conv1.conv',
}


def _published(size: str, params: float, macs: float, top1: tuple[float, float]) -> list[Any]:
    """Weights of one size at 224: distilled on ImageNet-22k and tuned, trained on ImageNet-1k alone, distilled only.

    Args:
        top1: of the first two.
    """
    common: dict[str, Any] = {'params': params, 'macs': macs, 'crop_pct': 0.875, **_PAPER}
    path = f'{_URL}tiny_vit_{size}'
    return [
        weights('dist_in22k_ft_in1k', f'{path}_22kto1k_distill.pth', top1=top1[0], **common),
        weights('in1k', f'{path}_1k.pth', top1=top1[1], **common),
        weights('dist_in22k', f'{path}_22k_distill.pth', top1=None, num_classes=21841, **common),
    ]


def _finer(size: int, top1: float, macs: float) -> list[Any]:
    """Weights of the largest model tuned at a larger size, where the whole image is scaled to it."""
    url = f'{_URL}tiny_vit_21m_22kto1k_{size}_distill.pth'
    return [
        weights('dist_in22k_ft_in1k', url, top1=top1, params=21, macs=macs, size=size, crop_pct=1.0, **_PAPER),
    ]


_21M: dict[str, Any] = {'depths': (2, 2, 6, 2), 'dims': (96, 192, 384, 576), 'num_heads': (3, 6, 12, 18)}

register(
    'tiny_vit_5m_224',
    TinyViT,
    depths=(2, 2, 6, 2),
    dims=(64, 128, 160, 320),
    num_heads=(2, 4, 5, 10),
    window_size=(7, 7, 14, 7),
    drop_path=0.0,
    weights=_published('5m', 5.4, 1.3, (80.7, 79.1)),
)
register(
    'tiny_vit_11m_224',
    TinyViT,
    depths=(2, 2, 6, 2),
    dims=(64, 128, 256, 448),
    num_heads=(2, 4, 8, 14),
    window_size=(7, 7, 14, 7),
    drop_path=0.1,
    weights=_published('11m', 11, 2.0, (83.2, 81.5)),
)
register(
    'tiny_vit_21m_224',
    TinyViT,
    **_21M,
    window_size=(7, 7, 14, 7),
    drop_path=0.2,
    weights=_published('21m', 21, 4.3, (84.8, 83.1)),
)
register(
    'tiny_vit_21m_384',
    TinyViT,
    **_21M,
    window_size=(12, 12, 24, 12),
    drop_path=0.1,
    weights=_finer(384, 86.2, 13.8),
)
register(
    'tiny_vit_21m_512',
    TinyViT,
    **_21M,
    window_size=(16, 16, 32, 16),
    drop_path=0.1,
    weights=_finer(512, 86.5, 27.0),
)
