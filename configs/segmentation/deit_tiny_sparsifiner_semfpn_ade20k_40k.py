"""Semantic FPN on DeiT-Ti with Sparsifiner: each patch attends to a quarter of the tokens."""

from mmengine.config import read_base

with read_base():
    from .deit_tiny_semfpn_ade20k_40k import *

model['backbone'].update(reduction=dict(type='sparsifiner'))

# no figure was published; not trained here
