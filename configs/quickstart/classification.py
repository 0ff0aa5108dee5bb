"""Scanned handwritten digits (scikit-learn, 32x32) with a small CAFormer: two minutes on two CPU cores."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import ImageFolder
from densezoo.heads import OwnClassifier
from densezoo.train import ImageClassifier, Preprocess
from densezoo.train.evaluators import Accuracy

with read_base():
    from .._base_.schedule_quickstart import *

max_iters = 1000

model = dict(
    type=ImageClassifier,
    # Strides of 4, 8, 16 and 32 leave 8x8, 4x4, 2x2 and 1x1 tokens of a 32x32 scan.
    backbone=dict(
        type=create_model,
        name='caformer_s18',
        num_classes=10,
        dims=(32, 64, 128, 192),
        depths=(1, 2, 2, 1),
        drop_path_rate=0.05,
    ),
    head=dict(type=OwnClassifier, num_classes=10, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)

train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(
        type=ImageFolder,
        root='demo:classification',
        split='train',
        # No flips: a mirrored digit is another sign.
        transforms=[
            dict(
                type=v2.RandomAffine,
                degrees=12,
                translate=(0.08, 0.08),
                scale=(0.85, 1.15),
                shear=8,
                interpolation='bilinear',
            ),
        ],
    ),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    dataset=dict(type=ImageFolder, root='demo:classification', split='val'),
)
val_evaluator = dict(type=Accuracy, topk=(1, 5))

train_cfg.update(max_iters=max_iters, val_interval=500)
param_scheduler[1].update(end=max_iters)
