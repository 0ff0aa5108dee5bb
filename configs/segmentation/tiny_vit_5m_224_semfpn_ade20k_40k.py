"""Semantic FPN on TinyViT-5M, ADE20K: PoolFormer's recipe; the authors publish none."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_semfpn_ade20k_40k import *

model['backbone'].update(name='tiny_vit_5m_224')

# no published figure; not trained here
