"""SLAB-CSWin-T on ImageNet-1k: the authors' recipe (batch 2048, AdamW 2e-3, 20 epochs of warm-up)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='slab_cswin_tiny', drop_path_rate=0.1),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
train_dataloader.update(batch_size=256)  # on each of 8 GPUs: 2048
val_dataloader['dataset']['transforms'][0].update(size=256)  # 224 / 0.875
optim_wrapper['optimizer'].update(lr=2e-3)
param_scheduler[0].update(end=20)
param_scheduler[1].update(begin=20, T_max=300 - 20, eta_min=4e-5)
default_hooks.update(norm_schedule=dict(until=0.64))  # 120,000 of 187,500 iterations

# published: 82.8 top-1; not trained here
