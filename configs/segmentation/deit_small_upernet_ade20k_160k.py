"""UPerNet with an auxiliary FCN on DeiT-S, ADE20K, Swin's recipe: AdamW 6e-5, batch 16, 160k iterations."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FCN, UPerNet
from densezoo.train import Preprocess, Segmentor

with read_base():
    from .._base_.ade20k_160k import *

model = dict(
    type=Segmentor,
    backbone=dict(
        type=create_model,
        name='deit_small_patch16_224',
        pretrained=True,
        features_only=True,
        drop_path_rate=0.1,
        pyramid_blocks=(3, 5, 7, 11),
    ),
    head=dict(type=UPerNet, num_classes=150, channels=512),
    auxiliary=dict(fcn=dict(type=FCN, num_classes=150, channels=256, loss_weight=0.4)),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# no figure was published; not trained here
