"""TAT's six degradations at once, and its loss that learns what each picture weighs, with a U-shaped decoder on
DeiT-S (plain, a simple pyramid)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import UNetRestorer

with read_base():
    from .tat_allinone_300k import *

model['backbone'] = dict(type=create_model, name='deit_small_patch16_224', features_only=True)
model['head'] = dict(type=UNetRestorer, channels=32, blocks=(1, 2, 2), loss='balanced')

# no published figure; not trained here
