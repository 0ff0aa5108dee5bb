"""RetinaNet on DeiT-Ti with STViT-R, without windows: one block of six gives the map back from semantic tokens."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_retinanet_coco_1x import *

model['backbone'].update(window_size=None, reduction=dict(type='stvit_r'))

# no figure was published; not trained here
