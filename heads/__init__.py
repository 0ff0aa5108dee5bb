"""Heads: feature pyramid -> task output, its loss, its decoding. Knows no backbone.

Every head is built with keyword arguments from `feature_info` (channels and strides) and has `forward(features)` (plain
tensors), `loss(features, targets)` (a dict of scalars; keys that start with `loss_` are summed) and
`predict(features, sizes, original_sizes)` (one dict per picture). A head for the loss alone (SBCB) predicts nothing.
"""

from .classification import LinearClassifier, OwnClassifier
from .deeplabv3plus import DeepLabV3Plus
from .deformable_detr import DeformableDETR
from .detr import DETR
from .efficientvit_seg import EfficientViTSeg
from .fcn import FCN
from .fcos import FCOS
from .fpn import FPN
from .kmax import KMaXDeepLab
from .mask2former import Mask2Former
from .maskrcnn import MaskRCNN
from .oneformer import OneFormer
from .pyramid import FeatureInfo, PyramidInfo
from .restoration import UNetRestorer
from .retinanet import RetinaNet
from .sbcb import SBCB
from .segformer import SegFormerHead
from .semantic_fpn import SemanticFPN
from .upernet import UPerNet

__all__ = [
    'DETR',
    'FCN',
    'FCOS',
    'FPN',
    'SBCB',
    'DeepLabV3Plus',
    'DeformableDETR',
    'EfficientViTSeg',
    'FeatureInfo',
    'KMaXDeepLab',
    'LinearClassifier',
    'Mask2Former',
    'MaskRCNN',
    'OneFormer',
    'OwnClassifier',
    'PyramidInfo',
    'RetinaNet',
    'SegFormerHead',
    'SemanticFPN',
    'UNetRestorer',
    'UPerNet',
]
