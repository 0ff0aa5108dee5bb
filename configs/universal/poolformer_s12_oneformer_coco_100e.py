"""OneFormer on PoolFormer-S12, COCO panoptic: the authors' recipe (AdamW, batch 16, 100 epochs).

merges=<CLIP's file of merges> in the head gives the authors' tokens, which published weights need; without, text is
read as bytes.
"""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OneFormer
from densezoo.train import Preprocess, UniversalSegmentor

with read_base():
    from .._base_.coco_panoptic_50e import *

max_iters = 737500  # 100 epochs

model = dict(
    type=UniversalSegmentor,
    backbone=dict(type=create_model, name='poolformer_s12', pretrained=True, features_only=True),
    head=dict(type=OneFormer, classes=coco_classes, things=80, num_queries=150),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_cfg.update(max_iters=max_iters)
param_scheduler[1].update(end=max_iters, milestones=[655556, 710184])

# published with Swin-L: 57.9 PQ, 49.0 mask AP, 67.4 mIoU, with this backbone nothing; not trained here
