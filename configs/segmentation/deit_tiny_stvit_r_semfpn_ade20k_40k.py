"""Semantic FPN on DeiT-Ti with STViT-R: most blocks work on semantic tokens, one of six gives them back to the map."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_semfpn_ade20k_40k import *

model['backbone'].update(reduction=dict(type='stvit_r'))

# no figure was published; not trained here
