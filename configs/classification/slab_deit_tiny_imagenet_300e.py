"""SLAB-DeiT-T on ImageNet-1k: the authors' recipe (batch 1024, AdamW 1e-3, 20 epochs of warm-up, clip 5.0)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='slab_deit_tiny'),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
val_dataloader['dataset']['transforms'][0].update(size=256)  # 224 / 0.875
optim_wrapper.update(clip_grad=dict(max_norm=5.0))
param_scheduler[0].update(end=20)
param_scheduler[1].update(begin=20, T_max=300 - 20)
default_hooks.update(norm_schedule=dict(until=0.16))  # 60,000 of 375,300 iterations

# published: 74.3 top-1; not trained here
