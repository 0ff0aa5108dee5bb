"""DeiT-S with PYRA: each block merges an eighth of its patches, re-activated; adapters of queries, keys and values."""

from mmengine.config import read_base

with read_base():
    from .deit_small_imagenet_300e import *

model['backbone'].update(reduction=dict(type='pyra', ratio=0.12))

# published for task adaptation on VTAB-1k alone; not trained here
