"""Parts that families share. Mixers, norms and activations are plain modules, importable and pluggable by name."""

from .block import MetaFormerBlock
from .downsample import ConvDownsample
from .map_mixer import MapMixer
from .mixers import MIXERS, Attention, IdentityMixer, PoolMixer, RandomMixer, SepConv, build_mixer, mixer
from .mlp import ACTIVATIONS, ConvMlp, Mlp, SquaredReLU, StarReLU
from .norm import NORMS, BatchNorm, JointNorm, LayerNorm, norm_factory
from .relative_position import RelativePositionBias
from .rep_norm import PRepBN, RepBN
from .scale import Scale, drop_path_schedule
from .token_attention import TOKEN_MIXERS, TokenAttention, build_token_mixer
from .token_block import TokenBlock
from .unified_norm import UnifiedNorm

__all__ = [
    'ACTIVATIONS',
    'MIXERS',
    'NORMS',
    'TOKEN_MIXERS',
    'Attention',
    'BatchNorm',
    'ConvDownsample',
    'ConvMlp',
    'IdentityMixer',
    'JointNorm',
    'LayerNorm',
    'MapMixer',
    'MetaFormerBlock',
    'Mlp',
    'PRepBN',
    'PoolMixer',
    'RandomMixer',
    'RelativePositionBias',
    'RepBN',
    'Scale',
    'SepConv',
    'SquaredReLU',
    'StarReLU',
    'TokenAttention',
    'TokenBlock',
    'UnifiedNorm',
    'build_mixer',
    'build_token_mixer',
    'drop_path_schedule',
    'mixer',
    'norm_factory',
]
