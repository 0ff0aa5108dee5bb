"""Histoformer's blocks as the decoder of DeiT (plain, a simple pyramid), on pairs in all weathers."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import UNetRestorer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=create_model, name='deit_small_patch16_224', features_only=True),
    head=dict(type=UNetRestorer, channels=32, blocks=(1, 2, 2), block='histoformer', loss='l1', pearson=1.0),
    preprocess=dict(type=Preprocess),
)
train_dataloader['dataset'].update(root='$DENSEZOO_DATA/allweather')
val_dataloader['dataset'].update(root='$DENSEZOO_DATA/allweather')

# no published figure; not trained here
