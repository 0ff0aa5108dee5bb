"""TNT-S on ImageNet-1k: the authors' recipe (1024 images, AdamW 1e-3) without repeated augmentation and averaging."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess

with read_base():
    from .._base_.imagenet_300e import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='tnt_s_patch16_224', drop_path_rate=0.1),
    head=dict(type=OwnClassifier, num_classes=1000, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)),
)

# published: 81.5 top-1; not trained here
