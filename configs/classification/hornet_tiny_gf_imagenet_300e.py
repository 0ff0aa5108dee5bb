"""HorNet-T (GF) on ImageNet-1k: the authors' recipe (batch 4096, AdamW 4e-3, 20 epochs of warm-up, clip 1), without
their averaged weights."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='hornet_tiny_gf', drop_path_rate=0.2),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
warmup_epochs = 20
optim_wrapper.update(clip_grad=dict(max_norm=1.0), accumulative_counts=4)  # 8 x 128 x 4 = 4096
optim_wrapper['optimizer'].update(lr=4e-3)
param_scheduler[0].update(end=warmup_epochs)
param_scheduler[1].update(begin=warmup_epochs, T_max=epochs - warmup_epochs, eta_min=1e-6)

# published: 83.0 top-1; not trained here
