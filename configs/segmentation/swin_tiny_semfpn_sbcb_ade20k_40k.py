"""Semantic FPN with SBCB on Swin-T, ADE20K: boundaries of the classes as a second task in training."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, SBCB, SemanticFPN
from densezoo.train import Preprocess, Segmentor

with read_base():
    from .._base_.ade20k_40k import *

model = dict(
    type=Segmentor,
    backbone=dict(
        type=create_model,
        name='swin_tiny_patch4_window7_224',
        pretrained=True,
        features_only=True,
        drop_path_rate=0.3,
    ),
    neck=dict(type=FPN, out_channels=256),
    head=dict(type=SemanticFPN, num_classes=150, channels=128),
    # 150 boundary logits per pixel would not fit: one set per 4 x 4 pixels
    auxiliary=dict(boundary=dict(type=SBCB, num_classes=150, stride=4)),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# no figure was published; not trained here
