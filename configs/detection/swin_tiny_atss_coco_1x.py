"""ATSS on Swin-T, COCO 1x (AdamW 1e-4, batch 16)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import ATSS, FPN
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(
        type=create_model,
        name='swin_tiny_patch4_window7_224',
        pretrained=True,
        features_only=True,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
    ),
    neck=dict(type=FPN, out_channels=256, extra='p6p7', extra_relu=False),
    head=dict(type=ATSS, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published for ResNet-50: 39.4 AP; with this backbone none; not trained here
