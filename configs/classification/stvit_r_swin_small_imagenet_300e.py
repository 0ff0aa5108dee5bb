"""STViT-R on Swin-S, ImageNet-1k: the authors' recipe, which is Swin's (batch 1024, AdamW 1e-3, clip 5.0)."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='stvit_r_swin_small', drop_path_rate=0.3),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
val_dataloader['dataset']['transforms'][0].update(size=256)  # 224 / 0.875
optim_wrapper.update(clip_grad=dict(max_norm=5.0))
param_scheduler[0].update(end=20)
param_scheduler[1].update(begin=20, T_max=300 - 20)

# published: 82.7 top-1; not trained here
