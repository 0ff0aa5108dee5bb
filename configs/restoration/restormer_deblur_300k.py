"""Restormer on pairs with motion blur: GoPro in the paper, measured on RGB."""

from mmengine.config import read_base

from densezoo.heads import OwnRestorer, Restormer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=Restormer),
    head=dict(type=OwnRestorer),
    preprocess=dict(type=Preprocess),
)
train_dataloader['dataset'].update(root='$DENSEZOO_DATA/deblur')
val_dataloader['dataset'].update(root='$DENSEZOO_DATA/deblur')
val_evaluator.update(y_channel=False)

# published figures: tables of arXiv 2111.09881; not trained here
