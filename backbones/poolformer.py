"""PoolFormer: MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418.

Written from the paper and the facts of the authors' code, https://github.com/sail-sg/poolformer (Apache-2.0; the
weights carry the same licence). Differs: maps are (B, H, W, C) inside and 1x1 convolutions are linear layers, so the
MLPs' weights have two dimensions; sizes that stride 4 does not divide are padded where the authors' stem drops border
pixels; dense form has output norms for the levels in `out_indices` alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layers import ConvDownsample, MetaFormerBlock, Mlp, build_mixer, drop_path_schedule, norm_factory
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage, rename


class PoolFormer(Hierarchical):
    """Blocks of average pooling and MLPs under GroupNorm with one group.

    Args:
        depths, dims: blocks and channels of each stage.
        mixers: token mixer by name or dict(name=..., option=...), one for all stages or one per stage.
        norm: normalisation of blocks, classifier and output maps, by name.
        mlp_ratio: width of the MLPs over that of the stage.
        layer_scale: start value of the branches' learnable scales; None leaves them out.
        img_size: not needed, taken for the sake of mixers that are made for one size.
        The others: see `Hierarchical.assemble`.
    """

    norm_first = True

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = 'pool',
        norm: str = 'joint',
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-5,
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
        mixers = per_stage('mixers', mixers)
        make_norm = norm_factory(norm)
        stem = ConvDownsample(in_chans, dims[0], kernel=7, stride=4, padding=2, image=True)
        downsample = partial(ConvDownsample, kernel=3, stride=2, padding=1)
        stages = [
            [
                MetaFormerBlock(
                    dim=dim,
                    norm=make_norm,
                    mixer=build_mixer(mixer, dim=dim),
                    drop_path=rate,
                    mlp=Mlp(dim=dim, ratio=mlp_ratio, act='gelu'),
                    layer_scale=layer_scale,
                )
                for rate in rates
            ]
            for dim, mixer, rates in zip(dims, mixers, drop_path_schedule(depths, drop_path_rate))
        ]
        self.assemble(
            dims=dims,
            downsamplings=[stem, *(downsample(a, b) for a, b in itertools.pairwise(dims))],
            stages=stages,
            output_norm=make_norm,
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
        """Linear layers as the authors' MLPs; convolutions keep PyTorch's own initialisation, as theirs do."""
        if isinstance(module, nn.Linear):
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names. Their `network` holds stages at even places and downsampling at odd ones."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'patch_embed\.proj\.', 'downsample_layers.0.conv.'),
    *((rf'network\.{2 * s + 1}\.proj\.', f'downsample_layers.{s + 1}.conv.') for s in range(3)),
    *((rf'network\.{2 * s}\.(\d+)\.layer_scale_(\d)$', rf'stages.{s}.\1.layer_scale\2.scale') for s in range(4)),
    *((rf'network\.{2 * s}\.', f'stages.{s}.') for s in range(4)),
    *((rf'norm{2 * s}\.', f'output_norms.{s}.') for s in range(4)),
]

_URL = 'https://github.com/sail-sg/poolformer/releases/download/v1.0/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2111.11418',
    'origin': 'https://github.com/sail-sg/poolformer',
}
_S, _M = (64, 128, 320, 512), (96, 192, 384, 768)

register(
    'poolformer_s12',
    PoolFormer,
    depths=(2, 2, 6, 2),
    dims=_S,
    layer_scale=1e-5,
    drop_path=0.1,
    weights=[
        weights('sail_in1k', _URL + 'poolformer_s12.pth.tar', top1=77.2, params=11.9, macs=1.8, crop_pct=0.9, **_PAPER)
    ],
)
register(
    'poolformer_s24',
    PoolFormer,
    depths=(4, 4, 12, 4),
    dims=_S,
    layer_scale=1e-5,
    drop_path=0.1,
    weights=[
        weights('sail_in1k', _URL + 'poolformer_s24.pth.tar', top1=80.3, params=21.4, macs=3.4, crop_pct=0.9, **_PAPER)
    ],
)
register(
    'poolformer_s36',
    PoolFormer,
    depths=(6, 6, 18, 6),
    dims=_S,
    layer_scale=1e-6,
    drop_path=0.2,
    weights=[
        weights('sail_in1k', _URL + 'poolformer_s36.pth.tar', top1=81.4, params=30.9, macs=5.0, crop_pct=0.9, **_PAPER)
    ],
)
register(
    'poolformer_m36',
    PoolFormer,
    depths=(6, 6, 18, 6),
    dims=_M,
    layer_scale=1e-6,
    drop_path=0.3,
    weights=[
        weights('sail_in1k', _URL + 'poolformer_m36.pth.tar', top1=82.1, params=56.2, macs=8.8, crop_pct=0.95, **_PAPER)
    ],
)
register(
    'poolformer_m48',
    PoolFormer,
    depths=(8, 8, 24, 8),
    dims=_M,
    layer_scale=1e-6,
    drop_path=0.4,
    weights=[
        weights(
            'sail_in1k', _URL + 'poolformer_m48.pth.tar', top1=82.5, params=73.5, macs=11.6, crop_pct=0.95, **_PAPER
        )
    ],
)
