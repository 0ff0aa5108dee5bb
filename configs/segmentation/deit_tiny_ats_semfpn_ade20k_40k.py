"""Semantic FPN on DeiT-Ti with ATS: as many tokens as the image needs, from the fourth block on."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_semfpn_ade20k_40k import *

model['backbone'].update(reduction=dict(type='ats'))

# no figure was published; not trained here
