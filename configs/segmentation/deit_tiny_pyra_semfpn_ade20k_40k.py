"""Semantic FPN on DeiT-Ti with PYRA: each block merges a tenth of its patches, re-activated."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_semfpn_ade20k_40k import *

model['backbone'].update(reduction=dict(type='pyra', ratio=0.1))

# no figure was published; not trained here
