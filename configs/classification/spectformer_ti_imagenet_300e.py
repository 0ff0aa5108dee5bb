"""SpectFormer-T on ImageNet-1k: the authors' recipe (8 GPUs of 128 images, AdamW 1e-3, clip 1.0, no erasing)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='spectformer_ti'),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
train_dataloader['dataset']['transforms'][3].update(p=0.0)
val_dataloader['dataset']['transforms'][0].update(size=256)  # 224 / 0.875
optim_wrapper.update(clip_grad=dict(max_norm=1.0))

# published: 76.9 top-1; not trained here
