"""Mask R-CNN on HorNet-T (GF), COCO 1x: AdamW 1e-4, layer decay 0.95, as the authors' recipe of HorNet-S."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, MaskRCNN
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(type=create_model, name='hornet_tiny_gf', pretrained=True, features_only=True, drop_path_rate=0.2),
    neck=dict(type=FPN, out_channels=256, extra='maxpool'),
    head=dict(type=MaskRCNN, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator.update(iou_types=('bbox', 'segm'))
optim_wrapper.update(paramwise_cfg=dict(layer_decay=0.95))
optim_wrapper['optimizer'].update(weight_decay=0.05)

# published with Cascade Mask R-CNN, 3x: 52.4 box AP, 45.6 mask AP, none with this head; not trained here
