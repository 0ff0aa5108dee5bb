"""TAT's six degradations at once, and its loss that learns what each picture weighs, with a U-shaped decoder on
Swin-T (windows)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import UNetRestorer

with read_base():
    from .tat_allinone_300k import *

model['backbone'] = dict(type=create_model, name='swin_tiny_patch4_window7_224', features_only=True)
model['head'] = dict(type=UNetRestorer, channels=32, blocks=(1, 2, 2), loss='balanced')

# no published figure; not trained here
