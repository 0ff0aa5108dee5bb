"""quickstart/segmentation with HorNet's gnConv in the pyramid in place of 3x3 convolutions."""

from mmengine.config import read_base

from densezoo.backbones.hornet import GnConv

with read_base():
    from .segmentation import *

model['neck'].update(mixer=dict(type=GnConv, order=2))
