"""Semantic FPN on PoolFormer-M48, ADE20K: the authors' recipe."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_semfpn_ade20k_40k import *

model['backbone'].update(name='poolformer_m48')

# published: 42.7 mIoU; not trained here
