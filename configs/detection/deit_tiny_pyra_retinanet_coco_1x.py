"""RetinaNet on DeiT-Ti with PYRA, without windows: each block merges a tenth of its patches, re-activated."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_retinanet_coco_1x import *

model['backbone'].update(window_size=None, reduction=dict(type='pyra', ratio=0.1))

# no figure was published; not trained here
