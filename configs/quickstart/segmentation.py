"""Handwritten digits on photographs, pixel by pixel, with a small CAFormer and Semantic FPN."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import MaskFolder
from densezoo.heads import FPN, SemanticFPN
from densezoo.train import Preprocess, Segmentor
from densezoo.train.evaluators import SegmentationMetric

with read_base():
    from .._base_.schedule_quickstart import *

max_iters = 3200

model = dict(
    type=Segmentor,
    backbone=dict(
        type=create_model,
        name='caformer_s18',
        features_only=True,
        dims=(32, 64, 160, 256),
        depths=(2, 2, 2, 1),
        # StarReLU squares its input: from small random weights it starts slowly, which minutes do not forgive.
        act='gelu',
        mixers=(dict(name='conv', act='gelu'), dict(name='conv', act='gelu'), 'attention', 'attention'),
    ),
    neck=dict(type=FPN, out_channels=64),
    # Strokes are thin and nine pixels of ten are photograph: a lighter background and a region loss.
    head=dict(
        type=SemanticFPN,
        num_classes=11,
        channels=64,
        dropout=0.0,
        class_weight=(0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
        dice_weight=1.0,
    ),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(
        type=MaskFolder,
        root='demo:segmentation',
        split='train',
        transforms=[dict(type=v2.ColorJitter, brightness=0.3, contrast=0.3)],
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    dataset=dict(type=MaskFolder, root='demo:segmentation', split='val'),
)
val_evaluator = dict(type=SegmentationMetric)

train_cfg.update(max_iters=max_iters, val_interval=1600)
param_scheduler[1].update(end=max_iters)
