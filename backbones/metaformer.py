"""IdentityFormer, RandFormer, PoolFormerV2, ConvFormer, CAFormer: MetaFormer Baselines for Vision, arXiv 2210.13452.

Written from the paper and the facts of the authors' code, https://github.com/sail-sg/metaformer (Apache-2.0; the
weights carry the same licence). Key names are the authors'. Differs: sizes that stride 4 does not divide are padded
where the authors' stem drops border pixels. The authors published no dense form: ours returns the stages' raw maps.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from .layers import ConvDownsample, MetaFormerBlock, Mlp, RandomMixer, build_mixer, drop_path_schedule, norm_factory
from .layers.grid import grid_of
from .registry import register, weights
from .sizes import FixedSize
from .skeleton import Hierarchical, check_stages, per_stage

_RANDOM = 'its random matrices hold one row per position; build the model with img_size= for another size'


class MetaFormer(Hierarchical):
    """Any token mixer per stage between channel MLPs with StarReLU, residual scales in the last two stages.

    Args:
        depths, dims: blocks and channels of each stage.
        mixers: token mixer by name or dict(name=..., option=...), one for all stages or one per stage.
        norm: normalisation of the blocks, by name.
        mlp_ratio: width of the MLPs over that of the stage.
        act: activation of the MLPs, by name.
        layer_scale, res_scale: start value of learnable scales of branches and of residuals, one for all stages or
            one per stage; None leaves them out.
        head: 'linear' or 'mlp' (four times wider hidden layer with squared ReLU).
        img_size: height and width that size-dependent mixers ('random') are made for; 224 if None.
        output_norm: normalisation of the dense form's maps, by name; None returns the stages' raw maps.
        The others: see `Hierarchical.assemble`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = 'identity',
        norm: str = 'layer_no_bias',
        mlp_ratio: float = 4.0,
        act: str = 'star_relu',
        layer_scale: float | Sequence[float | None] | None = None,
        res_scale: float | Sequence[float | None] | None = (None, None, 1.0, 1.0),
        head: str = 'linear',
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        output_norm: str | None = None,
    ):
        super().__init__()
        depths, dims = check_stages(depths, dims)
        grids = [grid_of(img_size, stride) for stride in self.strides]
        plain = norm_factory('layer_no_bias')
        stem = ConvDownsample(in_chans, dims[0], kernel=7, stride=4, padding=2, post_norm=plain, image=True)
        downsamplings = [
            ConvDownsample(a, b, kernel=3, stride=2, padding=1, pre_norm=plain) for a, b in itertools.pairwise(dims)
        ]
        stages = [
            [
                MetaFormerBlock(
                    dim=dim,
                    norm=norm_factory(norm),
                    drop_path=rate,
                    layer_scale=layer,
                    res_scale=res,
                    mixer=build_mixer(mixer, dim=dim, grid=grid),
                    mlp=Mlp(dim=dim, ratio=mlp_ratio, act=act, bias=False),
                )
                for rate in rates
            ]
            for dim, mixer, grid, rates, layer, res in zip(
                dims,
                per_stage('mixers', mixers),
                grids,
                drop_path_schedule(depths, drop_path_rate),
                per_stage('layer_scale', layer_scale),
                per_stage('res_scale', res_scale),
            )
        ]
        self.assemble(
            dims=dims,
            downsamplings=[stem, *downsamplings],
            stages=stages,
            output_norm=norm_factory(output_norm) if output_norm else None,
            norm=norm_factory('layer'),
            head=head,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if any(isinstance(module, RandomMixer) for module in self.modules()):
            self.sizes = FixedSize(grid_of(img_size, 1), _RANDOM)
        self.apply(self.init_weights)


class RandFormer(MetaFormer):
    """MetaFormer whose last two stages mix tokens by fixed random matrices: one image size alone."""

    sizes = FixedSize(224, _RANDOM)


_HUB = 'https://huggingface.co/sail/dl/resolve/main/'
_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2210.13452',
    'origin': 'https://github.com/sail-sg/metaformer',
}
# depths and dims of the sizes
_S12, _S24, _S36 = (((n, n, 3 * n, n), (64, 128, 320, 512)) for n in (2, 4, 6))
_M36, _M48 = (((n, n, 3 * n, n), (96, 192, 384, 768)) for n in (6, 8))
_S18 = (3, 3, 9, 3), (64, 128, 320, 512)
_S36L = (3, 12, 18, 3), (64, 128, 320, 512)
_M36L = (3, 12, 18, 3), (96, 192, 384, 576)
_B36L = (3, 12, 18, 3), (128, 256, 512, 768)

_RANDOM_LATE = ('identity', 'identity', 'random', 'random')
_ATTENTION_LATE = ('conv', 'conv', 'attention', 'attention')
_Size = tuple[tuple[int, ...], tuple[int, ...]]


def _basic(
    name: str, mixers: str | tuple[str, ...], size: _Size, *, drop_path: float, top1: float, params: float, macs: float
) -> None:
    """A model with a basic mixer, trained on ImageNet-1k at 224."""
    path = f'{_HUB}{name.split("_")[0]}/{name}'
    register(
        name,
        RandFormer if 'random' in mixers else MetaFormer,
        depths=size[0],
        dims=size[1],
        mixers=mixers,
        norm='joint_no_bias',
        drop_path=drop_path,
        weights=[weights('sail_in1k', f'{path}.pth', top1=top1, params=params, macs=macs, crop_pct=1.0, **_PAPER)],
    )


def _strong(
    name: str,
    mixers: str | tuple[str, ...],
    size: _Size,
    *,
    rates: tuple[float, float],
    top1: Sequence[float],
    params: float,
    macs: tuple[float, float],
) -> None:
    """A model with the five published sets of weights.

    Args:
        rates: stochastic depth and dropout before the last layer in training.
        top1: ImageNet-1k at 224 and 384; pre-trained on ImageNet-21k and tuned at 224 and 384.
        macs: at 224 and 384, in 1e9.
    """
    path = f'{_HUB}{name.split("_")[0]}/{name}'
    common: dict[str, Any] = {'params': params, 'crop_pct': 1.0, 'classifier': 'head.fc2', **_PAPER}
    small, large = {'macs': macs[0], **common}, {'macs': macs[1], 'size': 384, **common}
    register(
        name,
        MetaFormer,
        depths=size[0],
        dims=size[1],
        mixers=mixers,
        head='mlp',
        drop_path=rates[0],
        drop=rates[1],
        weights=[
            weights('sail_in1k', f'{path}.pth', top1=top1[0], **small),
            weights('sail_in1k_384', f'{path}_384.pth', top1=top1[1], **large),
            weights('sail_in22k_ft_in1k', f'{path}_in21ft1k.pth', top1=top1[2], **small),
            weights('sail_in22k_ft_in1k_384', f'{path}_384_in21ft1k.pth', top1=top1[3], **large),
            weights('sail_in22k', f'{path}_in21k.pth', top1=None, num_classes=21841, **small),
        ],
    )


_basic('identityformer_s12', 'identity', _S12, drop_path=0.1, top1=74.6, params=11.9, macs=1.8)
_basic('identityformer_s24', 'identity', _S24, drop_path=0.1, top1=78.2, params=21.3, macs=3.4)
_basic('identityformer_s36', 'identity', _S36, drop_path=0.2, top1=79.3, params=30.8, macs=5.0)
_basic('identityformer_m36', 'identity', _M36, drop_path=0.3, top1=80.0, params=56.1, macs=8.8)
_basic('identityformer_m48', 'identity', _M48, drop_path=0.4, top1=80.4, params=73.3, macs=11.5)

# params: the trained ones and the frozen random matrices together
_basic('randformer_s12', _RANDOM_LATE, _S12, drop_path=0.1, top1=76.6, params=12.1, macs=1.9)
_basic('randformer_s24', _RANDOM_LATE, _S24, drop_path=0.1, top1=78.2, params=21.8, macs=3.5)
_basic('randformer_s36', _RANDOM_LATE, _S36, drop_path=0.2, top1=79.5, params=31.5, macs=5.2)
_basic('randformer_m36', _RANDOM_LATE, _M36, drop_path=0.3, top1=81.2, params=56.8, macs=9.0)
_basic('randformer_m48', _RANDOM_LATE, _M48, drop_path=0.3, top1=81.4, params=74.2, macs=11.9)

_basic('poolformerv2_s12', 'pool', _S12, drop_path=0.1, top1=78.0, params=11.9, macs=1.8)
_basic('poolformerv2_s24', 'pool', _S24, drop_path=0.1, top1=80.7, params=21.3, macs=3.4)
_basic('poolformerv2_s36', 'pool', _S36, drop_path=0.2, top1=81.6, params=30.8, macs=5.0)
_basic('poolformerv2_m36', 'pool', _M36, drop_path=0.3, top1=82.2, params=56.1, macs=8.8)
_basic('poolformerv2_m48', 'pool', _M48, drop_path=0.4, top1=82.6, params=73.3, macs=11.5)

_strong('convformer_s18', 'conv', _S18, rates=(0.2, 0.0), params=26.8, macs=(3.9, 11.6), top1=(83.0, 84.4, 83.7, 85.0))
_strong('convformer_s36', 'conv', _S36L, rates=(0.3, 0.0), params=40.0, macs=(7.6, 22.4), top1=(84.1, 85.4, 85.4, 86.4))
_strong(
    'convformer_m36', 'conv', _M36L, rates=(0.4, 0.0), params=57.1, macs=(12.8, 37.7), top1=(84.5, 85.6, 86.1, 86.9)
)
_strong(
    'convformer_b36', 'conv', _B36L, rates=(0.6, 0.0), params=99.9, macs=(22.6, 66.5), top1=(84.8, 85.7, 87.0, 87.6)
)

_strong(
    'caformer_s18',
    _ATTENTION_LATE,
    _S18,
    rates=(0.15, 0.0),
    params=26.3,
    macs=(4.1, 13.4),
    top1=(83.6, 85.0, 84.1, 85.4),
)
_strong(
    'caformer_s36',
    _ATTENTION_LATE,
    _S36L,
    rates=(0.3, 0.4),
    params=39.3,
    macs=(8.0, 26.0),
    top1=(84.5, 85.7, 85.8, 86.9),
)
_strong(
    'caformer_m36',
    _ATTENTION_LATE,
    _M36L,
    rates=(0.4, 0.4),
    params=56.2,
    macs=(13.2, 42.0),
    top1=(85.2, 86.2, 86.6, 87.5),
)
_strong(
    'caformer_b36',
    _ATTENTION_LATE,
    _B36L,
    rates=(0.6, 0.5),
    params=98.8,
    macs=(23.2, 72.2),
    top1=(85.5, 86.4, 87.4, 88.1),
)
