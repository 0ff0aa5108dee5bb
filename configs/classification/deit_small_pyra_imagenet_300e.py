"""DeiT-S with PYRA's high compression and adapters of queries, keys and values."""

from mmengine.config import read_base

with read_base():
    from .deit_small_imagenet_300e import *

model['backbone'].update(reduction=dict(type='pyra'))

# published for task adaptation on VTAB-1k alone; not trained here
