"""Semantic FPN on T2T-ViT-14 with MCTF: each block but the first fuses a tenth of its patches with others."""

from mmengine.config import read_base

with read_base():
    from .t2t_vit_14_semfpn_ade20k_40k import *

model['backbone'].update(reduction=dict(type='mctf', ratio=0.1))

# no figure was published; not trained here
