"""DeiT-S with 16 semantic tokens from the fifth block on."""

from mmengine.config import read_base

with read_base():
    from .deit_small_imagenet_300e import *

model['backbone'].update(reduction=dict(type='stvit', tokens=16))

# the published figures are of the paper's own setting; not trained here
