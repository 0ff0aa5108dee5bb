"""Heads: feature pyramid -> task output, its loss, its decoding. Knows no backbone.

Every head is built with keyword arguments from `feature_info` (channels and strides) and has `forward(features)` (plain
tensors), `loss(features, targets)` (a dict of scalars; keys that start with `loss_` are summed) and
`predict(features, sizes, original_sizes)` (one dict per picture). A head for the loss alone (SBCB) predicts nothing.
Restormer, Histoformer, TAT and MAT are whole networks from picture to picture, which the task Restorer takes in the
backbone's place, with OwnRestorer as the head.
"""

from .atss import ATSS
from .cascade import CascadeRCNN
from .classification import LinearClassifier, OwnClassifier
from .deeplabv3plus import DeepLabV3Plus
from .deformable_detr import DeformableDETR
from .detr import DETR
from .efficientvit_seg import EfficientViTSeg
from .fcn import FCN
from .fcos import FCOS
from .fpn import FPN
from .gfl import GFL
from .histoformer import Histoformer
from .hybrid_encoder import HybridEncoder
from .kmax import KMaXDeepLab
from .mask2former import Mask2Former
from .maskrcnn import MaskRCNN
from .mat import MAT
from .oneformer import OneFormer
from .pyramid import FeatureInfo, PyramidInfo
from .restoration import OwnRestorer, UNetRestorer
from .restormer import Restormer
from .retinanet import RetinaNet
from .rtdetr import RTDETR
from .sbcb import SBCB
from .segformer import SegFormerHead
from .semantic_fpn import SemanticFPN
from .tat import TAT
from .upernet import UPerNet

__all__ = [
    'ATSS',
    'DETR',
    'FCN',
    'FCOS',
    'FPN',
    'GFL',
    'MAT',
    'RTDETR',
    'SBCB',
    'TAT',
    'CascadeRCNN',
    'DeepLabV3Plus',
    'DeformableDETR',
    'EfficientViTSeg',
    'FeatureInfo',
    'Histoformer',
    'HybridEncoder',
    'KMaXDeepLab',
    'LinearClassifier',
    'Mask2Former',
    'MaskRCNN',
    'OneFormer',
    'OwnClassifier',
    'OwnRestorer',
    'PyramidInfo',
    'Restormer',
    'RetinaNet',
    'SegFormerHead',
    'SemanticFPN',
    'UNetRestorer',
    'UPerNet',
]
