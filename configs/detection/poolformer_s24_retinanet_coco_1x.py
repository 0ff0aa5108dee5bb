"""RetinaNet on PoolFormer-S24, COCO 1x: the authors' recipe."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_retinanet_coco_1x import *

model['backbone'].update(name='poolformer_s24')

# published: 38.9 box AP; not trained here
