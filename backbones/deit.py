"""DeiT: Training data-efficient image transformers & distillation through attention, arXiv 2012.12877, and DeiT III:
Revenge of the ViT, arXiv 2204.07118.

Written from the papers and the facts of the authors' code, https://github.com/facebookresearch/deit (Apache-2.0; the
weights carry the same licence). Differs: other image sizes than the one that positions were made for are taken, by the
interpolation that the authors use for fine-tuning; sizes that the patches do not divide are padded. The distilled
model's logits are the mean of both heads in training too, unless `set_distilled_training` asks for the pair. The dense
form is ours: a simple feature pyramid.
"""

# B batch, N tokens, C channels, H W size of the grid, K classes
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import rename
from .layers import Mlp, TokenBlock, build_token_mixer, drop_path_schedule, norm_factory
from .layers.grid import grid_of
from .layers.heads import HeadFactory
from .layers.linear import Linear
from .layers.patches import build_stem
from .layers.path_ensemble import PathEnsemble
from .layers.positions import PositionTable
from .plain import Grid, Plain, block_windows, check_plain
from .reduction.interface import TokenModel
from .registry import register, weights

_log = logging.getLogger('densezoo')


class DistilledHead(nn.Module):
    """A linear layer for the class token and one for the distillation token; (B, 2, C) -> (B, K), their mean.

    Attributes:
        pair: return both logits while training, for a loss that tells them apart.
    """

    last: ClassVar[tuple[str, ...]] = ('fc', 'fc_dist')

    def __init__(self, dim: int, num_classes: int, drop_rate: float):
        super().__init__()
        self.drop_rate, self.hidden_size, self.pair = drop_rate, dim, False
        self.fc = Linear(dim, num_classes)
        self.fc_dist = Linear(dim, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Any:
        if pre_logits:
            return x.mean(1)
        x = F.dropout(x, self.drop_rate, self.training)
        logits, distilled = self.fc(x[:, 0]), self.fc_dist(x[:, 1])
        return (logits, distilled) if self.pair and self.training else (logits + distilled) / 2


class DeiT(Plain):
    """The vision transformer: pre-norm blocks of attention and MLP, learned positions, a class token.

    Args:
        depth, dim: blocks and channels.
        num_heads: attention heads.
        patch_size: pixels of a patch's side, and their stride.
        stem: how patches become tokens, 'linear' or 'hmlp' (patches of 16), see `layers.patches`.
        mlp_ratio: width of the MLPs over dim.
        qkv_bias: learn a bias of queries, keys and values.
        token_mixer: by name or dict(name=..., option=...), see `layers.token_attention`: dict(clip=dict(alpha=4.0),
            gate='linear', key_drop=0.5) sets options of the attention.
        norm: normalisation throughout, by name.
        layer_scale: start value of the branches' learnable scales; None leaves them out.
        distilled: a distillation token and a second head.
        class_token: without it the classifier reads the mean of all tokens.
        class_position: prefix tokens have positions too.
        constant_drop_path: all blocks drop at `drop_path_rate`; otherwise the rate rises to it.
        path_scale: start value of EnsembleScale, learnable weights of what each branch adds to the last block's output;
            None has none. See `layers.path_ensemble`.
        pruned_paths: numbers of the paths left out of that sum.
        window_size: side of the windows that patches attend within, for large images in dense form; None for none.
        global_blocks: blocks without windows, four evenly spaced ones if None.
        pyramid_dim: channels of the dense form's maps for heads without a neck, see `Plain.assemble`.
        pyramid_blocks: blocks that the dense form's maps are read from, see `Plain.assemble`.
        img_size: height and width that positions are made for, 224 if None.
        The others: see `Plain.assemble`.
    """

    # the authors fine-tune at other sizes by plain bicubic interpolation
    resize_method: ClassVar[str] = 'bicubic'

    def __init__(
        self,
        *,
        depth: int = 12,
        dim: int = 384,
        num_heads: int = 6,
        patch_size: int = 16,
        stem: str = 'linear',
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        token_mixer: str | Mapping[str, Any] = 'attention',
        norm: str = 'layer',
        layer_scale: float | None = None,
        distilled: bool = False,
        class_token: bool = True,
        class_position: bool = True,
        constant_drop_path: bool = False,
        path_scale: float | None = None,
        pruned_paths: Sequence[int] = (),
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
        if distilled and not class_token:
            raise ValueError(f'a distilled model needs its class token, got {distilled=}, {class_token=}')
        make_norm = norm_factory(norm)
        prefix = ('cls_token', 'dist_token')[: class_token + distilled]
        grid = grid_of(img_size, patch_size)
        rising = drop_path_schedule([depth], drop_path_rate)[0]
        self.distilled, self.drop_path_rises = distilled, not constant_drop_path
        blocks = [
            TokenBlock(
                dim=dim,
                norm=make_norm,
                attn=build_token_mixer(
                    token_mixer,
                    dim=dim,
                    num_heads=num_heads,
                    prefix=len(prefix),
                    qkv_bias=qkv_bias,
                    window_size=window,
                    grid=grid,
                ),
                mlp=Mlp(dim=dim, ratio=mlp_ratio),
                drop_path=drop_path_rate if constant_drop_path else rate,
                layer_scale=layer_scale,
            )
            for window, rate in zip(block_windows(depth, window_size, global_blocks), rising)
        ]
        self.path_ensemble = (
            PathEnsemble(depth=depth, dim=dim, pruned=pruned_paths, init=path_scale)
            if path_scale is not None or pruned_paths
            else None
        )
        head: str | HeadFactory = DistilledHead if distilled else 'linear'
        self.assemble(
            dim=dim,
            stride=patch_size,
            patch_embed=build_stem(stem, in_chans=in_chans, dim=dim, patch_size=patch_size),
            position=PositionTable(
                dim,
                grid,
                prefix=len(prefix) if class_position else 0,
                method=self.resize_method,
            ),
            prefix=prefix,
            blocks=blocks,
            norm=make_norm,
            pooling='token' if class_token else 'avg',
            head=head,
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

    def run_blocks(
        self, x: Tensor, grid: Grid, wanted: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As in `Plain`; with weighed or pruned paths the sum of those, where all blocks run."""
        paths = self.path_ensemble
        if paths is None:
            return super().run_blocks(x, grid, wanted, last)
        total, kept = paths.add(None, 0, x), []
        for i, block in enumerate(self.blocks):
            mixed: Tensor = self._call(block.mix_tokens, x, grid)  # type: ignore[arg-type]
            after: Tensor = self._call(block.mix_channels, mixed)  # type: ignore[arg-type]
            total = paths.add(paths.add(total, 2 * i + 1, mixed - x), 2 * i + 2, after - mixed)
            x = after
            if i in wanted:
                kept.append(x)
            if i == last:
                break
        return (x if total is None else total), kept

    @property
    def prefix_suffices(self) -> bool:
        return self.path_ensemble is None and super().prefix_suffices

    def token_model(self) -> TokenModel:
        if self.path_ensemble is not None:
            raise ValueError(f'{self.title} sums its paths over all tokens; reduce_tokens takes it without path_scale')
        return super().token_model()

    def pool(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, C); for two heads (B, 2, C)."""
        if not self.distilled or self.pooling == 'avg':
            x = super().pool(x)
            return x if not isinstance(self.head, DistilledHead) else x[:, None].expand(-1, 2, -1)
        return x[:, :2] if isinstance(self.head, DistilledHead) else x[:, :2].mean(1)

    def set_distilled_training(self, enable: bool = True) -> None:
        """While training, return the logits of both heads as a pair instead of their mean.

        Raises:
            ValueError: the model has one head.
        """
        if not isinstance(getattr(self, 'head', None), DistilledHead):
            raise ValueError('set_distilled_training needs a distilled classifier: build it with distilled=True')
        self.head.pair = enable  # type: ignore[assignment]

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names."""
        heads = [(r'head\.(weight|bias)', r'head.fc.\1')] if any(key.startswith('head_dist.') for key in state) else []
        return rename(state, [*heads, *RENAMES])

    def resample(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for this image size; of a distilled model's weights an undistilled one takes the class token's.

        Raises:
            ValueError: the weights are an undistilled model's, and this one has a distillation token.
        """
        if self.distilled and 'cls_token' in state and 'dist_token' not in state:
            raise ValueError(
                'the weights are of an undistilled model, which has neither dist_token nor head_dist; load them into '
                'one with distilled=False'
            )
        if not self.distilled and 'dist_token' in state:
            state = rename(state, [(r'head\.fc\.', 'head.')])
            dropped = [key for key in state if key == 'dist_token' or key.startswith('head.fc_dist.')]
            for key in dropped:
                del state[key]
            position = state.get('pos_embed.table')
            if position is not None:
                state['pos_embed.table'] = position[:, [i for i in range(position.shape[1]) if i != 1]]
            _log.info('distilled weights into an undistilled model: left out %s', ', '.join(dropped))
        return super().resample(state)


RENAMES = [
    (r'pos_embed$', 'pos_embed.table'),
    (r'patch_embed\.proj\.(weight|bias)$', r'patch_embed.conv.\1'),
    (r'blocks\.(\d+)\.gamma_(\d)$', r'blocks.\1.layer_scale\2.scale'),
    (r'head_dist\.', 'head.fc_dist.'),
]

URL = 'https://dl.fbaipublicfiles.com/deit/'
ORIGIN: dict[str, Any] = {'origin': 'https://github.com/facebookresearch/deit', 'first_conv': 'patch_embed.conv'}
_DEIT: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2012.12877', 'crop_pct': 0.875, **ORIGIN}
_DISTILLED: dict[str, Any] = {'classifier': ('head.fc', 'head.fc_dist'), **_DEIT}
_DEIT3: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2204.07118', 'crop_pct': 1.0, **ORIGIN}
_TINY: dict[str, Any] = {'depth': 12, 'dim': 192, 'num_heads': 3}
_SMALL: dict[str, Any] = {'depth': 12, 'dim': 384, 'num_heads': 6}
_MEDIUM: dict[str, Any] = {'depth': 12, 'dim': 512, 'num_heads': 8}
_BASE: dict[str, Any] = {'depth': 12, 'dim': 768, 'num_heads': 12}
_LARGE: dict[str, Any] = {'depth': 24, 'dim': 1024, 'num_heads': 16}
_HUGE: dict[str, Any] = {'depth': 32, 'dim': 1280, 'num_heads': 16, 'patch_size': 14}
_LS: dict[str, Any] = {'layer_scale': 1e-4, 'class_position': False, 'constant_drop_path': True}

# the README gives tiny 5 million parameters; the published file holds 5.7
register(
    'deit_tiny_patch16_224',
    DeiT,
    drop_path=0.1,
    weights=[weights('fb_in1k', URL + 'deit_tiny_patch16_224-a1311bcf.pth', top1=72.2, params=5.7, macs=None, **_DEIT)],
    **_TINY,
)
register(
    'deit_small_patch16_224',
    DeiT,
    drop_path=0.1,
    weights=[weights('fb_in1k', URL + 'deit_small_patch16_224-cd65a155.pth', top1=79.9, params=22, macs=None, **_DEIT)],
    **_SMALL,
)
register(
    'deit_base_patch16_224',
    DeiT,
    drop_path=0.1,
    weights=[weights('fb_in1k', URL + 'deit_base_patch16_224-b5f2ef4d.pth', top1=81.8, params=86, macs=None, **_DEIT)],
    **_BASE,
)
register(
    'deit_base_patch16_384',
    DeiT,
    img_size=384,
    drop_path=0.1,
    weights=[
        weights(
            'fb_in1k', URL + 'deit_base_patch16_384-8de9b5d1.pth', top1=82.9, params=87, macs=None, size=384, **_DEIT
        )
    ],
    **_BASE,
)
register(
    'deit_tiny_distilled_patch16_224',
    DeiT,
    distilled=True,
    drop_path=0.1,
    weights=[
        weights(
            'fb_in1k',
            URL + 'deit_tiny_distilled_patch16_224-b40b3cf7.pth',
            top1=74.5,
            params=6,
            macs=None,
            **_DISTILLED,
        )
    ],
    **_TINY,
)
register(
    'deit_small_distilled_patch16_224',
    DeiT,
    distilled=True,
    drop_path=0.1,
    weights=[
        weights(
            'fb_in1k',
            URL + 'deit_small_distilled_patch16_224-649709d9.pth',
            top1=81.2,
            params=22,
            macs=None,
            **_DISTILLED,
        )
    ],
    **_SMALL,
)
register(
    'deit_base_distilled_patch16_224',
    DeiT,
    distilled=True,
    drop_path=0.1,
    weights=[
        weights(
            'fb_in1k',
            URL + 'deit_base_distilled_patch16_224-df68dfff.pth',
            top1=83.4,
            params=87,
            macs=None,
            **_DISTILLED,
        )
    ],
    **_BASE,
)
register(
    'deit_base_distilled_patch16_384',
    DeiT,
    distilled=True,
    img_size=384,
    drop_path=0.1,
    weights=[
        weights(
            'fb_in1k',
            URL + 'deit_base_distilled_patch16_384-d0272ac0.pth',
            top1=85.2,
            params=88,
            macs=None,
            size=384,
            **_DISTILLED,
        )
    ],
    **_BASE,
)


def _deit3(
    size: str, pixels: int, params: float, macs: float | None, in1k: float | None, in22k: float | None
) -> list[Any]:
    """Published sets of one DeiT III model: trained on ImageNet-1k, and on ImageNet-21k then fine-tuned."""
    suffix = '_v1' if size == 'huge' else ''
    return [
        weights(
            tag,
            f'{URL}deit_3_{size}_{pixels}_{name}.pth',
            top1=top1,
            params=params,
            macs=macs,
            size=pixels,
            **_DEIT3,
        )
        for tag, name, top1 in (('fb_in1k', '1k', in1k), ('fb_in22k_ft_in1k', '21k' + suffix, in22k))
    ]


# the authors' code has the tiny model, their list of results does not
register(
    'deit_tiny_patch16_ls',
    DeiT,
    weights=[weights('fb_in1k', None, top1=None, params=5.7, macs=None, **_DEIT3)],
    **_TINY,
    **_LS,
)
register(
    'deit_small_patch16_ls', DeiT, drop_path=0.05, weights=_deit3('small', 224, 22.0, 4.6, 81.4, 83.1), **_SMALL, **_LS
)
register('deit_medium_patch16_ls', DeiT, weights=_deit3('medium', 224, 38.8, None, None, None), **_MEDIUM, **_LS)
register(
    'deit_base_patch16_ls', DeiT, drop_path=0.2, weights=_deit3('base', 224, 86.6, 17.5, 83.8, 85.7), **_BASE, **_LS
)
register(
    'deit_large_patch16_ls',
    DeiT,
    drop_path=0.45,
    weights=_deit3('large', 224, 304.4, 61.6, 84.9, 87.0),
    **_LARGE,
    **_LS,
)
register(
    'deit_huge_patch14_ls', DeiT, drop_path=0.6, weights=_deit3('huge', 224, 632.1, 167.4, 85.2, 87.2), **_HUGE, **_LS
)
register(
    'deit_small_patch16_ls_384',
    DeiT,
    img_size=384,
    weights=_deit3('small', 384, 22, 15.5, 83.4, 84.8),
    **_SMALL,
    **_LS,
)
register(
    'deit_base_patch16_ls_384',
    DeiT,
    img_size=384,
    drop_path=0.2,
    weights=_deit3('base', 384, 86.9, 55.5, 85.0, 86.7),
    **_BASE,
    **_LS,
)
register(
    'deit_large_patch16_ls_384',
    DeiT,
    img_size=384,
    drop_path=0.45,
    weights=_deit3('large', 384, 304.8, 191.2, 85.8, 87.7),
    **_LARGE,
    **_LS,
)
