"""DETR on PoolFormer-S12, 150 epochs (AdamW 1e-4, batch 16): a transformer on the map of stride 32."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import DETR
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_detr_150e import *

model = dict(
    type=Detector,
    backbone=dict(type=create_model, name='poolformer_s12', pretrained=True, features_only=True, out_indices=(3,)),
    head=dict(type=DETR, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published for ResNet-50: 40.1 AP (MMDetection, 150 epochs); with this backbone none; not trained here
