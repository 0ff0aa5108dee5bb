"""TAT's six degradations at once, and its loss that learns what each picture weighs, with a U-shaped decoder on
PoolFormer-S12 (pooling)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import UNetRestorer

with read_base():
    from .tat_allinone_300k import *

model['backbone'] = dict(type=create_model, name='poolformer_s12', features_only=True)
model['head'] = dict(type=UNetRestorer, channels=32, blocks=(1, 2, 2), loss='balanced')

# no published figure; not trained here
