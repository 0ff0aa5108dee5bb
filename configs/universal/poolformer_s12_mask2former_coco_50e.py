"""Mask2Former on PoolFormer-S12, COCO panoptic: the authors' recipe (AdamW, batch 16, 50 epochs)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import Mask2Former
from densezoo.train import Preprocess, UniversalSegmentor

with read_base():
    from .._base_.coco_panoptic_50e import *

model = dict(
    type=UniversalSegmentor,
    backbone=dict(type=create_model, name='poolformer_s12', pretrained=True, features_only=True),
    head=dict(type=Mask2Former, num_classes=133, things=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# no figure was published; not trained here
