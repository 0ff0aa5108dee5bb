"""Deformable DETR on Swin-T, 50 epochs (AdamW 2e-4, batch 32), with box refinement and two stages."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import DeformableDETR
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_deformable_50e import *

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
    head=dict(type=DeformableDETR, num_classes=80, refine=True, two_stages=True),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published for ResNet-50: 46.2 AP; with this backbone none; not trained here
