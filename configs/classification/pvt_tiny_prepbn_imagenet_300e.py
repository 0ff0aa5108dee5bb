"""PVT-T with PRepBN on ImageNet-1k: the authors' recipe (batch 1024, AdamW 1e-3, 5 epochs of warm-up)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='pvt_tiny_prepbn'),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
val_dataloader['dataset']['transforms'][0].update(size=256)  # 224 / 0.875
param_scheduler[1].update(eta_min=2e-5)
default_hooks.update(norm_schedule=dict(until=0.8))  # 300,000 of 375,300 iterations

# published: 76.0 top-1; not trained here
