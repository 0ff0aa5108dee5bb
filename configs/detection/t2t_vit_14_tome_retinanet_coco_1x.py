"""RetinaNet on T2T-ViT-14 with ToMe: each block merges a tenth of its patches, and attends to all of them."""

from mmengine.config import read_base

with read_base():
    from .t2t_vit_14_retinanet_coco_1x import *

model['backbone'].update(window_size=None, reduction=dict(type='tome', ratio=0.1))

# no figure was published; not trained here
