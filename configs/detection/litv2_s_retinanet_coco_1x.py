"""RetinaNet on LITv2-S, COCO 1x: the authors' recipe (AdamW 1e-4, batch 16, FPN from stride 8)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, RetinaNet
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(
        type=create_model,
        name='litv2_s',
        pretrained=True,
        features_only=True,
        dense='det',
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
    ),
    neck=dict(type=FPN, out_channels=256, extra='p6p7', extra_source='input', extra_relu=False),
    head=dict(type=RetinaNet, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published: 44.0 box AP; not trained here
