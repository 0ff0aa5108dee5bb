"""RetinaNet on DeiT-Ti with Sparsifiner, without windows: each patch attends to a quarter of the tokens."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_retinanet_coco_1x import *

model['backbone'].update(window_size=None, reduction=dict(type='sparsifiner'))

# no figure was published; not trained here
