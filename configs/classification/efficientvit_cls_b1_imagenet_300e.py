"""EfficientViT-B1 on ImageNet-1k: AdamW 2e-3 at batch 1024, weight decay 0.1, 20 epochs of warm-up.

The authors train 20 + 300 epochs at sizes from 128 to 224 with binary cross-entropy and averaged weights; this recipe
has one size, 300 epochs and cross-entropy.
"""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='efficientvit_cls_b1', drop_path_rate=0.05),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
optim_wrapper['optimizer'].update(lr=8 * 2.5e-4, weight_decay=0.1)  # 2.5e-4 for each 128 images
param_scheduler[0].update(end=20)
param_scheduler[1].update(begin=20, T_max=epochs - 20)
val_dataloader['dataset']['transforms'][0].update(size=236)  # 224 / 0.95

# published: 79.39 top-1, by the authors' longer recipe; not trained here
