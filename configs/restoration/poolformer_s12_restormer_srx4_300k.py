"""Super-resolution x4: Restormer's blocks as the decoder of PoolFormer (pooling), on pictures made small."""

from mmengine.config import read_base

from densezoo.backbones import create_model

with read_base():
    from .swin_tiny_restormer_srx4_300k import *

model['backbone'] = dict(type=create_model, name='poolformer_s12', features_only=True)

# no published figure; not trained here
