"""CCT-14/7x2 on ImageNet-1k: the authors' recipe (8 GPUs of 128 images, AdamW 5e-4, 10 epochs of warm-up)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='cct_14_7x2_224', drop_path_rate=0.1, attn_drop=0.1),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
optim_wrapper['optimizer'].update(lr=5e-4)
param_scheduler[0].update(end=10)
param_scheduler[1].update(begin=10, T_max=300 - 10)

# published: 80.67 top-1; not trained here
