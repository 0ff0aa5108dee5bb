"""SegFormer's head on PoolFormer-S12, ADE20K: AdamW 6e-5, batch 16, 160k iterations."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import SegFormerHead
from densezoo.train import Preprocess, Segmentor

with read_base():
    from .._base_.ade20k_160k import *

model = dict(
    type=Segmentor,
    backbone=dict(type=create_model, name='poolformer_s12', pretrained=True, features_only=True),
    head=dict(type=SegFormerHead, num_classes=150, channels=256),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# no figure was published; not trained here
