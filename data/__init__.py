"""Datasets, transforms, samplers and the built-in demo data. Knows no model and no training framework.

dataset = CocoDetection(root='demo:detection', split='train', transforms=[dict(type=v2.RandomHorizontalFlip)])
sample = dataset[(index, draw)]     # {'image': (3, H, W) uint8 RGB, 'target': dict}; augmented by (seed, draw)
"""

from .base import ImageDataset
from .coco import CocoDetection
from .collate import MixCollate, collate
from .degradations import JPEG, Blur, Degrade, Downscale, GaussianNoise, Haze, PoissonNoise, Rain, RandomDegrade, Snow
from .errors import DataError
from .holes import Holes
from .imagefolder import ImageFolder
from .imageio import probe, read_alpha, read_image, read_mask
from .masks import ADE20K, Cityscapes, MaskFolder
from .mosaic import Mosaic
from .panoptic import CocoPanoptic, PanopticFolder
from .paths import data_home, expand_root
from .restoration import CleanFolder, PairedFolder
from .samplers import AspectRatioBatchSampler, EvalSampler, RestartableSampler
from .tensors import IGNORE, InstanceMasks, SemanticMask
from .transforms import (
    BoxesFromMasks,
    CropWithoutOneClassDominating,
    LargeScaleJitter,
    RandomCrop,
    ResizeImageOnly,
    ResizeRange,
    boxes_of_masks,
    build_transforms,
)
from .voc import VOCDetection, VOCSegmentation

__all__ = [
    'ADE20K',
    'IGNORE',
    'JPEG',
    'AspectRatioBatchSampler',
    'Blur',
    'BoxesFromMasks',
    'Cityscapes',
    'CleanFolder',
    'CocoDetection',
    'CocoPanoptic',
    'CropWithoutOneClassDominating',
    'DataError',
    'Degrade',
    'Downscale',
    'EvalSampler',
    'GaussianNoise',
    'Haze',
    'Holes',
    'ImageDataset',
    'ImageFolder',
    'InstanceMasks',
    'LargeScaleJitter',
    'MaskFolder',
    'MixCollate',
    'Mosaic',
    'PairedFolder',
    'PanopticFolder',
    'PoissonNoise',
    'Rain',
    'RandomCrop',
    'RandomDegrade',
    'ResizeImageOnly',
    'ResizeRange',
    'RestartableSampler',
    'SemanticMask',
    'Snow',
    'VOCDetection',
    'VOCSegmentation',
    'boxes_of_masks',
    'build_transforms',
    'collate',
    'data_home',
    'expand_root',
    'probe',
    'read_alpha',
    'read_image',
    'read_mask',
]
