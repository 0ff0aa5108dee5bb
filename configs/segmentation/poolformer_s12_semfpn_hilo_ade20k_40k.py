"""Semantic FPN whose pyramid mixes by HiLo attention in place of 3x3 convolutions, on PoolFormer-S12, ADE20K."""

from mmengine.config import read_base

from densezoo.backbones.litv2 import HiLo

with read_base():
    from .poolformer_s12_semfpn_ade20k_40k import *

model['neck'].update(mixer=dict(type=HiLo))

# no figure was published; not trained here
