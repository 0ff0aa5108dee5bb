"""RetinaNet on DeiT-Ti with ATS, without windows: as many tokens as the image needs, from the fourth block on."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_retinanet_coco_1x import *

model['backbone'].update(window_size=None, reduction=dict(type='ats'))

# no figure was published; not trained here
