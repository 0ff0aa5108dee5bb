"""Semantic FPN whose pyramid mixes by HiLo attention in place of 3x3 convolutions, on LITv2-S, ADE20K."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.backbones.litv2 import HiLo
from densezoo.heads import FPN, SemanticFPN
from densezoo.train import Preprocess, Segmentor

with read_base():
    from .._base_.ade20k_40k import *

model = dict(
    type=Segmentor,
    backbone=dict(type=create_model, name='litv2_s', pretrained=True, features_only=True, drop_path_rate=0.2),
    neck=dict(type=FPN, out_channels=256, mixer=dict(type=HiLo)),
    head=dict(type=SemanticFPN, num_classes=150, channels=128),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
optim_wrapper['optimizer'].update(lr=1e-4)

# no figure was published; not trained here
