"""Parts that families share. Mixers, norms and activations are plain modules, importable and pluggable by name."""

from .block import MetaFormerBlock
from .downsample import ConvDownsample
from .mixers import MIXERS, Attention, IdentityMixer, PoolMixer, RandomMixer, SepConv, build_mixer, mixer
from .mlp import ACTIVATIONS, Mlp, SquaredReLU, StarReLU
from .norm import NORMS, JointNorm, LayerNorm, norm_factory
from .scale import Scale, drop_path_schedule

__all__ = [
    'ACTIVATIONS',
    'MIXERS',
    'NORMS',
    'Attention',
    'ConvDownsample',
    'IdentityMixer',
    'JointNorm',
    'LayerNorm',
    'MetaFormerBlock',
    'Mlp',
    'PoolMixer',
    'RandomMixer',
    'Scale',
    'SepConv',
    'SquaredReLU',
    'StarReLU',
    'build_mixer',
    'drop_path_schedule',
    'mixer',
    'norm_factory',
]
