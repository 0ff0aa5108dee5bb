"""Large holes with a U-shaped decoder on DeiT-S (plain, a simple pyramid), 512 x 512; data as for MAT."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import UNetRestorer

with read_base():
    from .mat_inpaint512_300k import *

model['backbone'] = dict(type=create_model, name='deit_small_patch16_224', features_only=True, in_chans=4)
model['head'] = dict(type=UNetRestorer, channels=32, blocks=(1, 2, 2), holes=True, loss='l1')

# no published figure; not trained here
