"""RT-DETR on PoolFormer-S12, 72 epochs (AdamW 1e-4, batch 16, 640 x 640): no suppression."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import RTDETR, HybridEncoder
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_rtdetr_72e import *

model = dict(
    type=Detector,
    backbone=dict(type=create_model, name='poolformer_s12', pretrained=True, features_only=True, out_indices=(1, 2, 3)),
    neck=dict(type=HybridEncoder),
    head=dict(type=RTDETR, num_classes=80, detections=300),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published for ResNet-50: 53.1 AP; with this backbone none; not trained here
