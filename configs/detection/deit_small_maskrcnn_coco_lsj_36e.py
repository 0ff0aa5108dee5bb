"""Mask R-CNN on DeiT-S, as ViTDet: simple pyramid, large-scale jittering."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, MaskRCNN
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_lsj_36e import *

model = dict(
    type=Detector,
    backbone=dict(
        type=create_model,
        name='deit_small_patch16_224',
        pretrained=True,
        features_only=True,
        drop_path_rate=0.1,
        window_size=14,
    ),
    neck=dict(type=FPN, out_channels=256, extra='maxpool', norm='group'),
    head=dict(type=MaskRCNN, num_classes=80, rpn_convs=2),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published for ViT-B with MAE weights: 51.6 box AP; with this backbone none; not trained here
