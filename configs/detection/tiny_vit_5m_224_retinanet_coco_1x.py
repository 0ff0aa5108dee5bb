"""RetinaNet on TinyViT-5M, COCO 1x: PoolFormer's recipe; the authors publish none."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_retinanet_coco_1x import *

model['backbone'].update(name='tiny_vit_5m_224')

# no published figure; not trained here
