"""CCT, CVT and ViT-Lite: Escaping the Big Data Paradigm with Compact Transformers, arXiv 2104.05704.

Written from the paper and the facts of the authors' code, https://github.com/SHI-Labs/Compact-Transformers
(Apache-2.0). Differs: other sizes than the one that positions were made for are taken by bilinear interpolation, which
the authors use when they load learned positions; sinusoids are resized like those. The published models of CIFAR and
Flowers have 10, 100 or 102 classes (`num_classes`) and means of their own in `default_cfg`. The dense form is ours.
"""

# B batch, N tokens, C channels, H W size of the grid
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import rename
from .layers import ConvDownsample, Mlp, TokenBlock, build_token_mixer, drop_path_schedule, norm_factory
from .layers.fold_norm import fold_into_next
from .layers.grid import grid_of, to_last
from .layers.linear import Linear
from .layers.lookup import nearest
from .layers.positions import PositionTable
from .layers.scale import fold_scale
from .plain import Plain, block_windows, check_plain
from .registry import register, weights
from .sizes import Resampled

POSITIONS = ('learnable', 'sine', 'none')


class ConvTokenizer(nn.Module):
    """Convolutions, each with a ReLU and max pooling of stride 2; (B, C, H, W) -> (B, H / stride, W / stride, dim).

    Args:
        in_chans, dim: channels.
        kernel: odd side of the kernels; those of 7 have stride 2, smaller ones none.
        layers: number of convolutions.
        hidden: channels between them.
    """

    def __init__(self, in_chans: int, dim: int, *, kernel: int, layers: int, hidden: int = 64):
        super().__init__()
        if kernel < 3 or kernel % 2 == 0 or layers < 1:
            raise ValueError(f'kernel must be odd and at least 3, and layers positive, got {kernel=}, {layers=}')
        step = max(1, kernel // 2 - 1)
        widths = [in_chans, *[hidden] * (layers - 1), dim]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.stride = (2 * step) ** layers

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(F.max_pool2d(conv(x), 3, 2, 1))  # a quarter of the positions, and the same values
        return to_last(x)


class CompactBlock(TokenBlock):
    """Attention as in `TokenBlock`; then the tokens themselves are normalised, and the MLP reads and joins them:
    x = norm2(x), x = x + mlp(x)."""

    def mix_channels(self, x: Tensor) -> Tensor:
        x = self.norm2(x)
        return self._add(x, self.mlp(x), self.layer_scale2)

    def for_deploy(self) -> nn.Module:
        """As in `TokenBlock`, but `norm2` stays: what follows it is not the MLP alone."""
        self.norm1 = fold_into_next(self.norm1, self.attn)
        self.layer_scale1 = fold_scale(self.attn, self.layer_scale1)
        self.layer_scale2 = fold_scale(self.mlp, self.layer_scale2)
        return self


def sinusoids(rows: int, dim: int) -> Tensor:
    """(1, rows, dim): sines and cosines, interleaved, of row / 10000 ** (2 k / dim) for k from 0 to dim / 2 - 1."""
    pair = torch.arange(dim, dtype=torch.float64).div(2, rounding_mode='floor')
    angles = (torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (2 * pair / dim)).float()
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())[None]


class CCT(Plain):
    """A convolutional or patch tokenizer, blocks that normalise their tokens, and pooling by attention.

    Args:
        depth, dim: blocks and channels.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs over dim.
        kernel: side of the tokenizer's kernels, or of the patches.
        conv_layers: convolutions of the tokenizer, see `ConvTokenizer`; 0 takes patches of kernel x kernel pixels.
        pooling: 'seq', a softmax over all tokens of one learned score each, or 'token', a class token (ViT-Lite).
        positions: 'learnable', 'sine' (of the tokens in row order, a class token first) or 'none'.
        qkv_bias: learn a bias of queries, keys and values.
        attn_drop: probability of dropping an attention weight while training, 0.1 in the authors' recipes.
        token_mixer, norm, window_size, global_blocks, pyramid_dim, pyramid_blocks, img_size: as in `DeiT`.
        The others: see `Plain.assemble`.
    """

    sizes = Resampled(how='position tables bilinearly')
    classifier_keys = ('norm.', 'head.', 'attention_pool.')
    reduced: ClassVar[dict[str, Any]] = {**Plain.reduced, 'depth': 3}

    def __init__(
        self,
        *,
        depth: int = 14,
        dim: int = 384,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        kernel: int = 7,
        conv_layers: int = 2,
        pooling: str = 'seq',
        positions: str = 'learnable',
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        token_mixer: str | Mapping[str, Any] = 'attention',
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
        check_plain(depth=depth, dim=dim, patch_size=kernel)
        for name, value, allowed in (('pooling', pooling, ('seq', 'token')), ('positions', positions, POSITIONS)):
            if value not in allowed:
                raise ValueError(f'{name} must be one of {", ".join(allowed)}, got {value!r}{nearest(value, allowed)}')
        if conv_layers < 0:
            raise ValueError(f'conv_layers must not be negative, got {conv_layers=}')
        make_norm = norm_factory(norm)
        prefix = ('cls_token',) if pooling == 'token' else ()
        tokenizer: nn.Module
        if conv_layers:
            tokenizer = ConvTokenizer(in_chans, dim, kernel=kernel, layers=conv_layers)
            stride = tokenizer.stride
        else:
            tokenizer = ConvDownsample(in_chans, dim, kernel=kernel, stride=kernel, padding=0, image=True)
            stride = kernel
        table = None
        if positions != 'none':
            table = PositionTable(
                dim,
                grid_of(img_size, stride),
                prefix=len(prefix),
                method='bilinear',
                trainable=positions == 'learnable',
            )
        self.assemble(
            dim=dim,
            stride=stride,
            patch_embed=tokenizer,
            position=table,
            prefix=prefix,
            blocks=[
                CompactBlock(
                    dim=dim,
                    norm=make_norm,
                    attn=build_token_mixer(
                        token_mixer,
                        dim=dim,
                        num_heads=num_heads,
                        prefix=len(prefix),
                        qkv_bias=qkv_bias,
                        window_size=window,
                        attn_drop=attn_drop,
                    ),
                    mlp=Mlp(dim=dim, ratio=mlp_ratio),
                    drop_path=rate,
                )
                for window, rate in zip(
                    block_windows(depth, window_size, global_blocks), drop_path_schedule([depth], drop_path_rate)[0]
                )
            ],
            norm=make_norm,
            pooling=pooling,
            pyramid_dim=pyramid_dim,
            pyramid_blocks=pyramid_blocks,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if pooling == 'seq' and not features_only:
            self.attention_pool = Linear(dim, 1)
        self.apply(self.init_weights)
        if table is not None and positions == 'sine':
            table.table.data = sinusoids(table.table.shape[1], dim)

    def pool(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, C)."""
        if self.pooling != 'seq':
            return super().pool(x)
        share = self.attention_pool(x).softmax(1)
        return (share.transpose(1, 2) @ x).squeeze(1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As the skeleton's; the pooling learns with the head."""
        groups = super().group_matcher(coarse)
        return {**groups, 'head': groups['head'] + r'|^attention_pool\.'}

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers as usual, positions with deviation 0.2, convolutions as He et al.; the class token starts at
        0."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, PositionTable):
            nn.init.trunc_normal_(module.table, std=0.2)
        else:
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names; patches are the tokenizers with a bias."""
        conv = 'patch_embed.conv.' if 'tokenizer.conv_layers.0.0.bias' in state else r'patch_embed.convs.\1.'
        return rename(state, [(r'tokenizer\.conv_layers\.(\d+)\.0\.', conv), *_RENAMES])


_RENAMES = [
    (r'classifier\.positional_emb$', 'pos_embed.table'),
    (r'classifier\.class_emb$', 'cls_token'),
    (r'classifier\.fc\.', 'head.'),
    (r'classifier\.blocks\.(\d+)\.pre_norm\.', r'blocks.\1.norm1.'),
    (r'classifier\.blocks\.(\d+)\.norm1\.', r'blocks.\1.norm2.'),
    (r'classifier\.blocks\.(\d+)\.self_attn\.', r'blocks.\1.attn.'),
    (r'classifier\.blocks\.(\d+)\.linear(\d)\.', r'blocks.\1.mlp.fc\2.'),
    (r'classifier\.', ''),
]

_URL = 'https://shi-labs.com/projects/cct/checkpoints/'
_REPOSITORY = 'https://github.com/SHI-Labs/Compact-Transformers'
_ORIGIN: dict[str, Any] = {'paper': 'https://arxiv.org/abs/2104.05704', 'origin': _REPOSITORY}
_CONV: dict[str, Any] = {'first_conv': 'patch_embed.convs.0'}
_CIFAR: dict[str, Any] = {
    **_ORIGIN,
    'size': 32,
    'crop_pct': 1.0,
    'top1': None,
    'mean': (0.4914, 0.4822, 0.4465),
    'std': (0.247, 0.2435, 0.2616),
}
_FLOWERS: dict[str, Any] = {
    **_ORIGIN,
    **_CONV,
    'crop_pct': 1.0,
    'num_classes': 102,
    'top1': None,
    'mean': (0.4353, 0.3773, 0.2872),
    'std': (0.2966, 0.2455, 0.2698),
}


def _cifar(params: float, macs: float | None, *, patches: bool = False, page: bool = False) -> list[Any]:
    """A model of CIFAR-10 without a direct address; `page`: files of the authors' first training script are linked
    in their repository."""
    first: dict[str, Any] = {'first_conv': 'patch_embed.conv'} if patches else _CONV
    linked = f'{_REPOSITORY}/tree/main/examples' if page else None
    return [weights('cifar10', None, params=params, macs=macs, page=linked, num_classes=10, **first, **_CIFAR)]


def _trained(*runs: tuple[str, int, str]) -> list[Any]:
    """Published sets of CCT-7/3x1: (tag, classes, file)."""
    return [
        weights(tag, f'{_URL}pretrained/{file}', params=3.760, macs=0.947, num_classes=classes, **_CONV, **_CIFAR)
        for tag, classes, file in runs
    ]


_2: dict[str, Any] = {'depth': 2, 'dim': 128, 'num_heads': 2, 'mlp_ratio': 1, 'drop_path': 0.1}
_4: dict[str, Any] = {**_2, 'depth': 4}
_6: dict[str, Any] = {'depth': 6, 'dim': 256, 'num_heads': 4, 'mlp_ratio': 2, 'drop_path': 0.1}
_7: dict[str, Any] = {**_6, 'depth': 7}
_14: dict[str, Any] = {'depth': 14, 'dim': 384, 'num_heads': 6, 'mlp_ratio': 3, 'drop_path': 0.1}
_3X1: dict[str, Any] = {'kernel': 3, 'conv_layers': 1, 'img_size': 32}
_3X2: dict[str, Any] = {'kernel': 3, 'conv_layers': 2, 'img_size': 32}
_7X2: dict[str, Any] = {'kernel': 7, 'conv_layers': 2}
_SINE: dict[str, Any] = {'positions': 'sine'}
_CVT: dict[str, Any] = {'kernel': 4, 'conv_layers': 0, 'img_size': 32}
_VIT: dict[str, Any] = {**_CVT, 'pooling': 'token'}

# accuracies of CIFAR-10, CIFAR-100 after 200 epochs: 89.17, 66.90; 91.45, 70.46; 94.81, 76.71; 93.56, 74.47;
# 93.83, 74.92 in the order of the models with a page
register('cct_2_3x2_32', CCT, weights=_cifar(0.284, 0.033, page=True), **_2, **_3X2)
register('cct_2_3x2_32_sine', CCT, weights=_cifar(0.284, 0.033), **_2, **_3X2, **_SINE)
register('cct_4_3x2_32', CCT, weights=_cifar(0.482, 0.046, page=True), **_4, **_3X2)
register('cct_4_3x2_32_sine', CCT, weights=_cifar(0.482, 0.046), **_4, **_3X2, **_SINE)
register('cct_6_3x1_32', CCT, weights=_cifar(3.168, 0.813, page=True), **_6, **_3X1)
register('cct_6_3x1_32_sine', CCT, weights=_cifar(3.168, 0.813), **_6, **_3X1, **_SINE)
register('cct_6_3x2_32', CCT, weights=_cifar(3.327, 0.241, page=True), **_6, **_3X2)
register('cct_6_3x2_32_sine', CCT, weights=_cifar(3.327, 0.241), **_6, **_3X2, **_SINE)
register('cct_7_3x2_32', CCT, weights=_cifar(3.853, 0.275, page=True), **_7, **_3X2)
register('cct_7_3x2_32_sine', CCT, weights=_cifar(3.853, 0.275), **_7, **_3X2, **_SINE)

# CIFAR-10 and CIFAR-100: 96.53 and 80.92 after 300 epochs, 97.48 and 82.72 after 1500, 98.00 and 82.87 after 5000
register(
    'cct_7_3x1_32', CCT, weights=_trained(('cifar10_300e', 10, 'cct_7_3x1_32_cifar10_300epochs.pth')), **_7, **_3X1
)
register(
    'cct_7_3x1_32_sine',
    CCT,
    weights=_trained(
        ('cifar10_5000e', 10, 'cct_7_3x1_32_sine_cifar10_5000epochs.pth'),
        ('cifar10_1500e', 10, 'cct_7_3x1_32_sine_cifar10_1500epochs.pth'),
    ),
    **_7,
    **_3X1,
    **_SINE,
)
register(
    'cct_7_3x1_32_c100',
    CCT,
    weights=_trained(('cifar100_300e', 100, 'cct_7_3x1_32_cifar100_300epochs.pth')),
    **_7,
    **_3X1,
)
register(
    'cct_7_3x1_32_sine_c100',
    CCT,
    weights=_trained(
        ('cifar100_5000e', 100, 'cct_7_3x1_32_sine_cifar100_5000epochs.pth'),
        ('cifar100_1500e', 100, 'cct_7_3x1_32_sine_cifar100_1500epochs.pth'),
    ),
    **_7,
    **_3X1,
    **_SINE,
)

# Flowers-102: 97.19 from scratch with sinusoids, 99.76 after ImageNet at 384; parameters of CCT-7 are counted
register('cct_7_7x2_224', CCT, weights=[weights('flowers', None, params=4.57, macs=None, **_FLOWERS)], **_7, **_7X2)
register(
    'cct_7_7x2_224_sine',
    CCT,
    weights=[weights('flowers', _URL + 'pretrained/cct_7_7x2_224_flowers102.pth', params=4.57, macs=None, **_FLOWERS)],
    **_7,
    **_7X2,
    **_SINE,
)
register(
    'cct_14_7x2_224',
    CCT,
    weights=[
        weights(
            'in1k',
            _URL + 'pretrained/cct_14_7x2_224_imagenet.pth',
            top1=80.67,
            params=22.36,
            macs=5.11,
            **_CONV,
            **_ORIGIN,
        )
    ],
    **_14,
    **_7X2,
)
register(
    'cct_14_7x2_384',
    CCT,
    img_size=384,
    weights=[
        weights(
            'in1k',
            _URL + 'finetuned/cct_14_7x2_384_imagenet.pth',
            top1=82.71,
            params=22.51,
            macs=15.02,
            size=384,
            crop_pct=1.0,
            **_CONV,
            **_ORIGIN,
        )
    ],
    **_14,
    **_7X2,
)
register(
    'cct_14_7x2_384_fl',
    CCT,
    img_size=384,
    weights=[
        weights(
            'in1k_ft_flowers',
            _URL + 'finetuned/cct_14_7x2_384_flowers102.pth',
            params=22.17,
            macs=None,
            size=384,
            **_FLOWERS,
        )
    ],
    **_14,
    **_7X2,
)

# CIFAR-10 and CIFAR-100 after 200 epochs: CVT-6 92.58, 72.25, CVT-7 92.43, 73.01, ViT-Lite-6 90.94, 69.20, ViT-Lite-7
# 91.38, 69.75; parameters of the models without a page are counted
register('cvt_2_4_32', CCT, weights=_cifar(0.213, None, patches=True), **_2, **_CVT)
register('cvt_2_4_32_sine', CCT, weights=_cifar(0.213, None, patches=True), **_2, **_CVT, **_SINE)
register('cvt_4_4_32', CCT, weights=_cifar(0.412, None, patches=True), **_4, **_CVT)
register('cvt_4_4_32_sine', CCT, weights=_cifar(0.412, None, patches=True), **_4, **_CVT, **_SINE)
register('cvt_6_4_32', CCT, weights=_cifar(3.190, 0.202, patches=True, page=True), **_6, **_CVT)
register('cvt_6_4_32_sine', CCT, weights=_cifar(3.190, 0.202, patches=True), **_6, **_CVT, **_SINE)
register('cvt_7_4_32', CCT, weights=_cifar(3.717, 0.236, patches=True, page=True), **_7, **_CVT)
register('cvt_7_4_32_sine', CCT, weights=_cifar(3.717, 0.236, patches=True), **_7, **_CVT, **_SINE)
register('vit_2_4_32', CCT, weights=_cifar(0.213, None, patches=True), **_2, **_VIT)
register('vit_2_4_32_sine', CCT, weights=_cifar(0.213, None, patches=True), **_2, **_VIT, **_SINE)
register('vit_4_4_32', CCT, weights=_cifar(0.412, None, patches=True), **_4, **_VIT)
register('vit_4_4_32_sine', CCT, weights=_cifar(0.412, None, patches=True), **_4, **_VIT, **_SINE)
register('vit_6_4_32', CCT, weights=_cifar(3.191, 0.205, patches=True, page=True), **_6, **_VIT)
register('vit_6_4_32_sine', CCT, weights=_cifar(3.191, 0.205, patches=True), **_6, **_VIT, **_SINE)
register('vit_7_4_32', CCT, weights=_cifar(3.717, 0.239, patches=True, page=True), **_7, **_VIT)
register('vit_7_4_32_sine', CCT, weights=_cifar(3.717, 0.239, patches=True), **_7, **_VIT, **_SINE)
