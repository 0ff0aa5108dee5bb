"""LITv2: Fast Vision Transformers with HiLo Attention, arXiv 2205.13213.

Written from the paper and the facts of the authors' code, https://github.com/ziplab/LITv2 (Apache-2.0; the weights
carry the same licence). Differs: odd maps are padded where the authors' token merging drops the last row and column;
the classifier takes every size, by the padding of the authors' dense form, where theirs takes square ones alone.
Weights of LITv2-S for other values of alpha: https://github.com/ziplab/LITv2/releases/tag/v1.1, to be loaded by
`create_model('litv2_s', alpha=0.5, checkpoint_path=...)`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import hilo_attention, window_attention
from .layers import ConvDownsample, ConvMlp, mixer, norm_factory
from .layers.deform import DeformableMerging
from .layers.grid import grid_of, pad_bottom_right, to_first
from .layers.linear import Linear
from .layers.lookup import choose
from .lit import MergingPyramid, build_stages
from .pvt_v2 import resolve_heads
from .registry import register, weights
from .skeleton import check_stages, per_stage, rename

# B batch, C channels, H W size of the current stage, h heads, d head width, w window


@mixer('hilo')
class HiLo(nn.Module):
    """High frequencies: attention inside windows. Low frequencies: attention to the map averaged over windows.

    The output's channels are those of the high heads, then those of the low heads. Where the window does not divide
    the map, it is padded by zeros below and to the right, which both branches see.

    Args:
        dim: channels.
        num_heads: attention heads; dim // 32 if None.
        window_size: side w of the windows; 1 is plain attention, all heads low.
        alpha: share of low heads, rounded down to whole ones.
        qkv_bias: queries, keys and values have biases.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int | None = None,
        window_size: int = 2,
        alpha: float = 0.9,
        qkv_bias: bool = True,
    ):
        super().__init__()
        heads = resolve_heads(dim, num_heads)
        if window_size < 1 or not 0 <= alpha <= 1:
            raise ValueError(
                f'window_size must be positive and alpha from 0 to 1, got window_size={window_size}, alpha={alpha}'
            )
        self.num_heads, self.window_size, self.alpha = heads, window_size, alpha
        self.l_heads = int(heads * alpha) if window_size > 1 else heads
        self.h_heads = heads - self.l_heads
        low, high = self.l_heads * dim // heads, self.h_heads * dim // heads
        if low:
            self.l_q = Linear(dim, low, bias=qkv_bias)
            self.l_kv = Linear(dim, 2 * low, bias=qkv_bias)
            self.l_proj = Linear(low, low)
        if high:
            self.h_qkv = Linear(dim, 3 * high, bias=qkv_bias)
            self.h_proj = Linear(high, high)

    def forward(self, x: Tensor) -> Tensor:
        if not self.h_heads:
            return self.l_proj(self._attend(self.l_q(x), self.l_kv(self._pool(x))))
        qkv = self.h_qkv(x)
        outside = self.h_qkv.bias if self.h_qkv.bias is not None else x.new_zeros(qkv.shape[-1])
        if not self.l_heads:
            return self.h_proj(window_attention(qkv, self.window_size, heads=self.h_heads, outside=outside))
        high, low = hilo_attention(
            qkv,
            self.l_q(x),
            self.l_kv(self._pool(x)),
            self.window_size,
            heads=(self.h_heads, self.l_heads),
            outside=outside,
        )
        return torch.cat((self.h_proj(high), self.l_proj(low)), -1)

    def _pool(self, x: Tensor) -> Tensor:
        """(B, ceil(H / w), ceil(W / w), C)."""
        if self.window_size == 1:
            return x
        return F.avg_pool2d(pad_bottom_right(to_first(x), self.window_size), self.window_size).permute(0, 2, 3, 1)

    def _attend(self, query: Tensor, key_value: Tensor) -> Tensor:
        B, H, W, C = query.shape
        query = query.reshape(B, H * W, self.l_heads, -1).transpose(1, 2)
        key, value = key_value.flatten(1, 2).unflatten(2, (2, self.l_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, H, W, C)

    def extra_repr(self) -> str:
        return f'window_size={self.window_size}, high heads={self.h_heads}, low heads={self.l_heads}'


class LITv2(MergingPyramid):
    """MLPs with a depthwise convolution alone in two stages, HiLo attention before them in the next two.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, window_size: of HiLo attention, one for all stages or one per stage; window 1 is plain attention.
        alpha: share of heads for low frequencies.
        mlp_ratio: width of the MLPs over that of the stage.
        qkv_bias: queries, keys and values have biases.
        mixers: token mixer of each stage: None for none, 'hilo' with the arguments above, or another by name or
            dict(name=..., option=...).
        norm: normalisation of blocks, classifier and output maps, by name.
        dense: the authors' two dense forms: 'seg' normalises all output maps, 'det' all but the first.
        img_size: height and width that other mixers are made for, 224 if None; 'hilo' needs none.
        The others: see `Hierarchical.assemble`.
    """

    norm_first = True
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 2, 1),
        'dims': (32, 64, 96, 128),
        'num_heads': (1, 2, 3, 4),
        'mlp_ratio': 2.0,
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: int | Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = (1, 1, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        mixers: Sequence[str | Mapping[str, Any] | None] = (None, None, 'hilo', 'hilo'),
        norm: str = 'layer_eps5',
        dense: str = 'seg',
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
        choose('dense', dense, {'seg': None, 'det': None})
        make_norm = norm_factory(norm)
        options = zip(
            per_stage('mixers', mixers), per_stage('num_heads', num_heads), per_stage('window_size', window_size)
        )
        specs = [
            dict(name='hilo', num_heads=heads, window_size=window, alpha=alpha, qkv_bias=qkv_bias)
            if spec == 'hilo'
            else spec
            for spec, heads, window in options
        ]
        stem = ConvDownsample(in_chans, dims[0], kernel=4, stride=4, padding=0, post_norm=make_norm, image=True)
        self.assemble(
            dims=dims,
            downsamplings=[stem, *(DeformableMerging(a, b) for a, b in itertools.pairwise(dims))],
            stages=build_stages(
                depths=depths,
                dims=dims,
                mixers=specs,
                grids=[grid_of(img_size, stride) for stride in self.strides],
                norm=make_norm,
                mlp=lambda stage: ConvMlp(dim=dims[stage], ratio=mlp_ratio),
                drop_path_rate=drop_path_rate,
            ),
            output_norm=make_norm,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if features_only and dense == 'det':
            self.drop_first_norm()
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        """The authors', which in the MLPs' convolutions is normal with deviation sqrt(2 / fan_out)."""
        super().init_weights(module)
        if isinstance(module, ConvMlp):
            conv = module.dwconv
            nn.init.normal_(conv.weight, std=math.sqrt(2 / math.prod(conv.kernel_size)))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, where downsampling is the end of a stage."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'patch_embed\.proj\.', 'downsample_layers.0.conv.'),
    (r'patch_embed\.norm\.', 'downsample_layers.0.post_norm.'),
    *((rf'layers\.{s}\.downsample\.', f'downsample_layers.{s + 1}.') for s in range(3)),
    (r'layers\.(\d)\.blocks\.(\d+)\.attn\.', r'stages.\1.\2.token_mixer.'),
    (r'layers\.(\d)\.blocks\.(\d+)\.mlp\.dwconv\.dwconv\.', r'stages.\1.\2.mlp.dwconv.'),
    (r'layers\.(\d)\.blocks\.', r'stages.\1.'),
    (r'norm(\d)\.', r'output_norms.\1.'),
]

_URL = 'https://github.com/ziplab/LITv2/releases/download/v1.0/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2205.13213',
    'origin': 'https://github.com/ziplab/LITv2',
    'crop_pct': 0.875,
}

register(
    'litv2_s',
    LITv2,
    depths=(2, 2, 6, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    drop_path=0.2,
    weights=[weights('ziplab_in1k', _URL + 'litv2_s.pth', top1=82.0, params=28, macs=3.7, **_PAPER)],
)
register(
    'litv2_m',
    LITv2,
    depths=(2, 2, 18, 2),
    dims=(96, 192, 384, 768),
    num_heads=(3, 6, 12, 24),
    drop_path=0.3,
    weights=[weights('ziplab_in1k', _URL + 'litv2_m.pth', top1=83.3, params=49, macs=7.5, **_PAPER)],
)
register(
    'litv2_b',
    LITv2,
    depths=(2, 2, 18, 2),
    dims=(128, 256, 512, 1024),
    num_heads=(4, 8, 16, 32),
    drop_path=0.5,
    weights=[
        weights('ziplab_in1k', _URL + 'litv2_b.pth', top1=83.6, params=87, macs=13.2, **_PAPER),
        weights(
            'ziplab_in1k_384',
            _URL + 'litv2_b_384.pth',
            top1=84.7,
            params=87,
            macs=39.7,
            **{**_PAPER, 'size': 384, 'crop_pct': 1.0},
        ),
    ],
)
