"""Mask R-CNN on PoolFormer-S24, COCO 1x: the authors' recipe."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_maskrcnn_coco_1x import *

model['backbone'].update(name='poolformer_s24')

# published: 40.1 box AP, 37.0 mask AP; not trained here
