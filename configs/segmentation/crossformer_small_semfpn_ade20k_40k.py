"""Semantic FPN on CrossFormer-S, ADE20K: the authors' recipe (AdamW 1e-4 at batch 16 and 80k, here 2e-4 at 32 and 40k).

The weights lie on a drive: download them and pass their path as `checkpoint_path` to the backbone.
"""

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
        name='crossformer_small',
        pretrained=False,
        features_only=True,
        drop_path_rate=0.2,
    ),
    neck=dict(type=FPN, out_channels=256),
    head=dict(type=SemanticFPN, num_classes=150, channels=128),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

# published: 46.4 mIoU; not trained here
