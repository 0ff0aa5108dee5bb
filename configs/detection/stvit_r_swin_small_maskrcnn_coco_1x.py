"""Mask R-CNN on STViT-R-Swin-S, COCO 1x: Swin's recipe (AdamW 1e-4, batch 16, 480 to 800 pixels), without crops."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, MaskRCNN
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(
        type=create_model,
        name='stvit_r_swin_small',
        pretrained=True,
        features_only=True,
        drop_path_rate=0.2,
    ),
    neck=dict(type=FPN, out_channels=256, extra='maxpool'),
    head=dict(type=MaskRCNN, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader['dataset'].update(masks=True)
train_dataloader['dataset']['transforms'][0].update(short=(480, 800))
val_dataloader['dataset'].update(masks=True)
val_evaluator.update(iou_types=('bbox', 'segm'))
optim_wrapper['optimizer'].update(weight_decay=0.05)

# published with Cascade Mask R-CNN, 3x and windows of its own: 51.8 box AP, 44.7 mask AP; not trained here
