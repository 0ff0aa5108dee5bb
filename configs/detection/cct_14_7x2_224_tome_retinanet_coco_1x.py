"""RetinaNet on CCT-14/7x2 with ToMe: each block merges a tenth of its patches, and attends to all of them."""

from mmengine.config import read_base

with read_base():
    from .cct_14_7x2_224_retinanet_coco_1x import *

model['backbone'].update(window_size=None, reduction=dict(type='tome', ratio=0.1))

# no figure was published; not trained here
