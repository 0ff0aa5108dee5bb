"""Mask R-CNN on CSWin-T, COCO 1x (AdamW 1e-4, batch 16); the authors published the 3x schedule and no configs."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, MaskRCNN
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(type=create_model, name='cswin_tiny', pretrained=True, features_only=True, drop_path_rate=0.2),
    neck=dict(type=FPN, out_channels=256, extra='maxpool'),
    head=dict(type=MaskRCNN, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator.update(iou_types=('bbox', 'segm'))
optim_wrapper['optimizer'].update(lr=1e-4, weight_decay=0.05)

# published: 49.0 box AP, 43.6 mask AP with the 3x schedule, none with 1x; not trained here
