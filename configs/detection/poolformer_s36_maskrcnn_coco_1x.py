"""Mask R-CNN on PoolFormer-S36, COCO 1x: the authors' recipe."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_maskrcnn_coco_1x import *

model['backbone'].update(name='poolformer_s36')

# published: 41.0 box AP, 37.7 mask AP; not trained here
