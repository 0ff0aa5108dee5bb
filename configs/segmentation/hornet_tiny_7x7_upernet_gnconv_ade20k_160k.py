"""UPerNet whose last convolution is gnConv, as HorNet's decoder has it, on HorNet-T (7x7), ADE20K, 160k iterations."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.backbones.hornet import GnConv
from densezoo.heads import FCN, UPerNet
from densezoo.train import Preprocess, Segmentor

with read_base():
    from .._base_.ade20k_160k import *

model = dict(
    type=Segmentor,
    backbone=dict(type=create_model, name='hornet_tiny_7x7', pretrained=True, features_only=True, drop_path_rate=0.2),
    head=dict(type=UPerNet, num_classes=150, channels=512, mixer=dict(type=GnConv, order=2)),
    auxiliary=dict(fcn=dict(type=FCN, num_classes=150, channels=256, loss_weight=0.4)),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
optim_wrapper['optimizer'].update(lr=1e-4, weight_decay=0.05)

# published with a plain UPerNet: 48.1 mIoU, with this decoder on HorNet-T nothing; not trained here
