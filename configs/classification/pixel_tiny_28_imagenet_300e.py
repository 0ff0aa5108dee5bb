"""Pixel transformer, tiny, on ImageNet-1k at 28 x 28 pixels: DeiT's recipe (1024 images, AdamW 1e-3)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='pixel_tiny_28', drop_path_rate=0.1),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
train_dataloader['dataset']['transforms'][0].update(size=(28, 28))
val_dataloader['dataset']['transforms'][0].update(size=32)  # 28 / 0.875
val_dataloader['dataset']['transforms'][1].update(size=28)

# no figure of this size was published; not trained here
