"""Authors' models out of a checkout of their repository, as peers of ours; nothing of theirs is in this one.

A repository is recognised by the file that defines its models. What those files import from packages that moved, or
that no model needs, is replaced while they load; everything else has to be installed (einops for CSWin and SLAB).
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from timm.layers import to_2tuple
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

Call = tuple[str, Mapping[str, Any]]  # a class or function of the module, and its arguments


class DeformConv2dPack(nn.Conv2d):
    """In place of LITv2's CUDA extension: a deformable convolution that predicts its own offsets."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int, lr_mult: float = 0.1
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.conv_offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Any:
        return deform_conv2d(x, self.conv_offset(x), self.weight, self.bias, self.stride, self.padding)


class DeformConv2dPackOfLIT(DeformConv2dPack):
    """In place of LIT's, which returns a pair."""

    def forward(self, x: Tensor, return_offset: bool = False) -> Any:
        return super().forward(x), None


# modules that authors' files import, and what they find there
StandIns = Mapping[str, Mapping[str, Any]]
STAND_INS: StandIns = {
    'timm.models.layers.helpers': {'to_2tuple': to_2tuple},
    'timm.models.registry': {'register_model': lambda function: function},  # keeps their names out of timm's registry
    'numpy.lib.arraypad': {'pad': np.pad},  # its place before NumPy 2
    'pytorch_wavelets': {'DWTForward': None, 'DWTInverse': None},  # imported by SpectFormer, never called
}
_DEFORM = 'mm_modules.DCN.modules.deform_conv2d'


@dataclass(frozen=True)
class Repository:
    """Where a repository defines which of our models.

    Attributes:
        url: of the repository.
        root: folder that its imports start from.
        module: dotted name below it.
        models: our name -> what to call. The first one is compared by default.
        stand_ins: of this repository, besides `STAND_INS`.
    """

    url: str
    root: str
    module: str
    models: Mapping[str, Call]
    stand_ins: StandIns = field(default_factory=dict)

    @property
    def file(self) -> str:
        return str(Path(self.root, *self.module.split('.')).with_suffix('.py'))


def _swin(width: int, depth: int, **others: Any) -> dict[str, Any]:
    heads = width // 32
    return {
        'embed_dim': width,
        'depths': [2, 2, depth, 2],
        'num_heads': [heads, 2 * heads, 4 * heads, 8 * heads],
        'drop_path_rate': 0.0,
        **others,
    }


def _crossformer(width: int, depths: list[int], plus: bool = False) -> dict[str, Any]:
    return {
        **_swin(width, 2),
        'depths': depths,
        'patch_size': [4, 8, 16, 32],
        'merge_size': [[2, 4]] * 3,
        'mlp_ratio': [4] * 4,
        'group_size': [4, 4, 14, 7] if plus else [7] * 4,
        'crs_interval': [4, 2, 1, 1] if plus else [8, 4, 2, 1],
        'use_acl': plus,
    }


_LITV2 = {'alpha': 0.9, 'local_ws': [0, 0, 2, 1]}
_GFNET = {'patch_size': 4, 'mlp_ratio': [4] * 4}
_TINY_VIT = {'depths': [2, 2, 6, 2], 'window_sizes': [7, 7, 14, 7]}

REPOSITORIES = (
    Repository(
        'https://github.com/microsoft/Swin-Transformer',
        '',
        'models.swin_transformer',
        {
            'swin_tiny_patch4_window7_224': ('SwinTransformer', _swin(96, 6)),
            'swin_small_patch4_window7_224': ('SwinTransformer', _swin(96, 18)),
            'swin_base_patch4_window7_224': ('SwinTransformer', _swin(128, 18)),
        },
    ),
    Repository(
        'https://github.com/whai362/PVT',
        'classification',
        'pvt_v2',
        {f'pvt_v2_{size}': (f'pvt_v2_{size}', {}) for size in ('b0', 'b1', 'b2', 'b2_li', 'b3', 'b4', 'b5')},
    ),
    Repository(
        'https://github.com/whai362/PVT',
        'classification',
        'pvt',
        {f'pvt_{size}': (f'pvt_{size}', {}) for size in ('tiny', 'small', 'medium', 'large')},
    ),
    Repository(
        'https://github.com/ziplab/LIT',
        'classification/code_for_lit_s_m_b',
        'models.lit',
        {'lit_s': ('LIT', _swin(96, 6)), 'lit_m': ('LIT', _swin(96, 18)), 'lit_b': ('LIT', _swin(128, 18))},
        {_DEFORM: {'DeformConv2dPack': DeformConv2dPackOfLIT}},
    ),
    Repository(
        'https://github.com/ziplab/LITv2',
        'classification',
        'models.litv2',
        {
            'litv2_s': ('LITv2', _swin(96, 6, **_LITV2)),
            'litv2_m': ('LITv2', _swin(96, 18, **_LITV2)),
            'litv2_b': ('LITv2', _swin(128, 18, **_LITV2)),
        },
        {_DEFORM: {'DeformConv2dPack': DeformConv2dPack}},
    ),
    Repository(
        'https://github.com/microsoft/CSWin-Transformer',
        '',
        'models.cswin',
        {
            'cswin_tiny': ('CSWin_64_12211_tiny_224', {}),
            'cswin_small': ('CSWin_64_24322_small_224', {}),
            'cswin_base': ('CSWin_96_24322_base_224', {}),
        },
    ),
    Repository(
        'https://github.com/cheerss/CrossFormer',
        '',
        'models.crossformer',
        {
            'crossformer_tiny': ('CrossFormer', _crossformer(64, [1, 1, 8, 6])),
            'crossformer_pp_small': ('CrossFormer', _crossformer(64, [2, 2, 18, 2], plus=True)),
            'crossformer_small': ('CrossFormer', _crossformer(96, [2, 2, 6, 2])),
            'crossformer_base': ('CrossFormer', _crossformer(96, [2, 2, 18, 2])),
        },
    ),
    Repository(
        'https://github.com/raoyongming/HorNet',
        '',
        'hornet',
        {
            name: (name, {})
            for name in ('hornet_tiny_7x7', 'hornet_tiny_gf', 'hornet_small_7x7', 'hornet_small_gf', 'hornet_base_gf')
        },
    ),
    Repository(
        'https://github.com/badripatro/SpectFormers',
        'hierarchical_architecture',
        'spectformer',
        {f'spectformer_h_{size}': (f'spectformer_{size}', {}) for size in ('s', 'b', 'l')},
    ),
    Repository(
        'https://github.com/raoyongming/GFNet',
        '',
        'gfnet',
        {
            'gfnet_h_ti': ('GFNetPyramid', {**_GFNET, 'embed_dim': [64, 128, 256, 512], 'depth': [3, 3, 10, 3]}),
            'gfnet_h_s': ('GFNetPyramid', {**_GFNET, 'embed_dim': [96, 192, 384, 768], 'depth': [3, 3, 10, 3]}),
            'gfnet_h_b': ('GFNetPyramid', {**_GFNET, 'embed_dim': [96, 192, 384, 768], 'depth': [3, 3, 27, 3]}),
        },
    ),
    Repository(
        'https://github.com/xinghaochen/SLAB',
        'classification',
        'models.slab_swin',
        {
            'slab_swin_tiny': ('SlabSwinTransformer', _swin(96, 6, window_size=56, attn_type='LLSS')),
            'slab_swin_small': ('SlabSwinTransformer', _swin(96, 18, window_size=56, attn_type='LLSS')),
        },
    ),
    Repository(
        'https://github.com/microsoft/Cream',
        'TinyViT',
        'models.tiny_vit',
        {
            'tiny_vit_5m_224': (
                'TinyViT',
                {**_TINY_VIT, 'embed_dims': [64, 128, 160, 320], 'num_heads': [2, 4, 5, 10]},
            ),
            'tiny_vit_11m_224': (
                'TinyViT',
                {**_TINY_VIT, 'embed_dims': [64, 128, 256, 448], 'num_heads': [2, 4, 8, 14]},
            ),
        },
    ),
    Repository(
        'https://github.com/sail-sg/poolformer',
        '',
        'models.poolformer',
        {f'poolformer_{size}': (f'poolformer_{size}', {}) for size in ('s12', 's24', 's36', 'm36', 'm48')},
    ),
    Repository(
        'https://github.com/sail-sg/metaformer',
        '',
        'metaformer_baselines',
        {
            f'{kind}_{size}': (f'{kind}_{size}', {})
            for kind, sizes in {
                'convformer': ('s18', 's36'),
                'caformer': ('s18', 's36'),
                'identityformer': ('s12', 's24'),
                'randformer': ('s12', 's24'),
                'poolformerv2': ('s12', 's24'),
            }.items()
            for size in sizes
        },
    ),
)


def find(folder: str) -> list[Repository]:
    """What a checkout holds.

    Raises:
        ValueError: it is of no repository that is known here.
    """
    found = [repository for repository in REPOSITORIES if (Path(folder) / repository.file).is_file()]
    if not found:
        known = ', '.join(dict.fromkeys(repository.url for repository in REPOSITORIES))
        raise ValueError(f'authors={folder!r} is no checkout of a known repository: {known}')
    return found


def default_models(folder: str) -> list[str]:
    """The first model of each file that a checkout holds."""
    return [next(iter(repository.models)) for repository in find(folder)]


def build(name: str, folder: str) -> nn.Module:
    """An authors' model in evaluation mode.

    Args:
        name: ours for it.
        folder: a checkout of their repository.

    Raises:
        ValueError: the checkout has no such model, or does not load with what is installed.
    """
    repositories = find(folder)
    known = {model: repository for repository in repositories for model in repository.models}
    if name not in known:
        raise ValueError(f'{repositories[0].url} has no model {name!r} for this benchmark; it has {", ".join(known)}')
    repository = known[name]
    attribute, arguments = repository.models[name]
    try:
        with _imports(Path(folder) / repository.root, {**STAND_INS, **repository.stand_ins}):
            model = getattr(importlib.import_module(repository.module), attribute)(**arguments)
    except ImportError as error:
        raise ValueError(f'{repository.file} of {repository.url} does not load here: {error}') from error
    return model.eval()


@contextmanager
def _imports(root: Path, stand_ins: StandIns) -> Iterator[None]:
    """Imports start from `root` and find the stand-ins; afterwards nothing of either is left."""
    before = dict(sys.modules)
    path = str(root.resolve())
    sys.path.insert(0, path)
    for name, content in stand_ins.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        sys.path.remove(path)
        for name, module in list(sys.modules.items()):
            theirs = str(getattr(module, '__file__', None) or '').startswith(path)
            if name in stand_ins or (theirs and name not in before):
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in stand_ins if name in before})
