"""Cascade Mask R-CNN on Swin-T, COCO 1x (AdamW 1e-4, batch 16)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, CascadeRCNN
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(
        type=create_model, name='swin_tiny_patch4_window7_224', pretrained=True, features_only=True, drop_path_rate=0.2
    ),
    neck=dict(type=FPN, out_channels=256, extra='maxpool'),
    head=dict(type=CascadeRCNN, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator.update(iou_types=('bbox', 'segm'))

# published, 36 epochs at several sizes: 50.4 box AP, 43.7 mask AP; not trained here
