"""RetinaNet on PoolFormer-S36, COCO 1x: the authors' recipe."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_retinanet_coco_1x import *

model['backbone'].update(name='poolformer_s36')

# published: 39.5 box AP; not trained here
