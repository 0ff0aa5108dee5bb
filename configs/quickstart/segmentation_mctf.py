"""`segmentation_deit` with tokens that fuse (MCTF): 35% fewer multiply-adds in the backbone."""

from mmengine.config import read_base

with read_base():
    from .segmentation_deit import *

# what target=0.65 finds: 144 patches before the second block, 51 after the last
model['backbone'].update(reduction=dict(type='mctf', ratio=0.1447))
