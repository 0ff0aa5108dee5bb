"""PyramidTNT-Ti on ImageNet-1k at 192 x 192: the authors' recipe (1024 images, AdamW 1e-3) without repeats."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='ptnt_ti_patch16_192', drop_path_rate=0.1),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)),
)
train_dataloader['dataset']['transforms'][0].update(size=(192, 192))
val_dataloader['dataset']['transforms'][0].update(size=213)  # 192 / 0.9
val_dataloader['dataset']['transforms'][1].update(size=192)
param_scheduler[0].update(end=20)
param_scheduler[1].update(begin=20, T_max=300 - 20)

# published: 75.2 top-1; not trained here
