"""Mask2Former on Swin-T, COCO panoptic: the authors' recipe (AdamW, batch 16, 50 epochs)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import Mask2Former
from densezoo.train import Preprocess, UniversalSegmentor

with read_base():
    from .._base_.coco_panoptic_50e import *

model = dict(
    type=UniversalSegmentor,
    backbone=dict(
        type=create_model,
        name='swin_tiny_patch4_window7_224',
        pretrained=True,
        features_only=True,
        drop_path_rate=0.3,
    ),
    head=dict(type=Mask2Former, num_classes=133, things=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published: 53.2 PQ, 43.3 mask AP, 63.2 mIoU; not trained here
