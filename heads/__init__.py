"""Heads: feature pyramid -> task output, its loss, its decoding. Knows no backbone.

Every head is built with keyword arguments from `feature_info` (channels and strides) and has `forward(features)` (plain
tensors), `loss(features, targets)` (a dict of scalars; keys that start with `loss_` are summed) and
`predict(features, sizes, original_sizes)` (one dict per picture). Restormer, Histoformer, TAT and MAT are whole
networks from picture to picture, which the task Restorer takes in the backbone's place, with OwnRestorer as the head.
"""

from .classification import LinearClassifier, OwnClassifier
from .efficientvit_seg import EfficientViTSeg
from .fcos import FCOS
from .fpn import FPN
from .histoformer import Histoformer
from .maskrcnn import MaskRCNN
from .mat import MAT
from .pyramid import FeatureInfo, PyramidInfo
from .restoration import OwnRestorer, UNetRestorer
from .restormer import Restormer
from .retinanet import RetinaNet
from .semantic_fpn import SemanticFPN
from .tat import TAT

__all__ = [
    'FCOS',
    'FPN',
    'MAT',
    'TAT',
    'EfficientViTSeg',
    'FeatureInfo',
    'Histoformer',
    'LinearClassifier',
    'MaskRCNN',
    'OwnClassifier',
    'OwnRestorer',
    'PyramidInfo',
    'Restormer',
    'RetinaNet',
    'SemanticFPN',
    'UNetRestorer',
]
