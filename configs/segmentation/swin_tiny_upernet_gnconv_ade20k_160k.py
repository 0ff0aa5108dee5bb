"""UPerNet whose last convolution is gnConv, as HorNet's decoder has it, on Swin-T, ADE20K, 160k iterations."""

from mmengine.config import read_base

from densezoo.backbones.hornet import GnConv

with read_base():
    from .swin_tiny_upernet_ade20k_160k import *

model['head'].update(mixer=dict(type=GnConv, order=2))

# no figure was published; not trained here
