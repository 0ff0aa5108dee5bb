"""DHVT-T on ImageNet-1k: the authors' recipe at batch 1024 (theirs: 256 images, AdamW 2.5e-4)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='dhvt_tiny_imagenet_patch16', drop_path_rate=0.1),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
val_dataloader['dataset']['transforms'][0].update(size=256)  # 224 / 0.875
param_scheduler[0].update(end=10)
param_scheduler[1].update(begin=10, T_max=300 - 10)

# published: 77.6 top-1; not trained here
