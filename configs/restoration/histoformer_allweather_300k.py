"""Histoformer on pairs in all weathers: Snow100K, Outdoor-Rain and RainDrop in the paper."""

from mmengine.config import read_base

from densezoo.heads import Histoformer, OwnRestorer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=Histoformer),
    head=dict(type=OwnRestorer, pearson=1.0),
    preprocess=dict(type=Preprocess),
)
train_dataloader['dataset'].update(root='$DENSEZOO_DATA/allweather')
val_dataloader['dataset'].update(root='$DENSEZOO_DATA/allweather')

# published figures: tables of arXiv 2407.10172; not trained here
