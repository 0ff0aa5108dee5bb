"""RetinaNet on UViT-S, COCO 1x (AdamW 1e-4, batch 16): patches of 8 pixels, windows that grow, a simple pyramid."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, RetinaNet
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(type=create_model, name='uvit_small', features_only=True, out_indices=(1, 2, 3), drop_path_rate=0.1),
    neck=dict(type=FPN, out_channels=256, extra='p6p7', extra_source='input', extra_relu=False),
    head=dict(type=RetinaNet, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published with Cascade Mask R-CNN at 896 x 896: 51.9 AP; not trained here
