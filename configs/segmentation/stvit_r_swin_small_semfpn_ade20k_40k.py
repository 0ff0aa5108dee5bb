"""Semantic FPN on STViT-R-Swin-S, ADE20K: PoolFormer's recipe (AdamW 2e-4, poly 0.9), 40k iterations of batch 32."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, SemanticFPN
from densezoo.train import Preprocess, Segmentor

with read_base():
    from .._base_.ade20k_40k import *

model = dict(
    type=Segmentor,
    backbone=dict(
        type=create_model,
        name='stvit_r_swin_small',
        pretrained=True,
        features_only=True,
        drop_path_rate=0.2,
    ),
    neck=dict(type=FPN, out_channels=256),
    head=dict(type=SemanticFPN, num_classes=150, channels=128),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# no figure was published; not trained here
