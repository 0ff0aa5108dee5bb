"""Histoformer's blocks as the decoder of PoolFormer (pooling), on pairs with snow."""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import UNetRestorer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=create_model, name='poolformer_s12', features_only=True),
    head=dict(type=UNetRestorer, channels=32, blocks=(1, 2, 2), block='histoformer', loss='l1', pearson=1.0),
    preprocess=dict(type=Preprocess),
)
train_dataloader['dataset'].update(root='$DENSEZOO_DATA/desnow')
val_dataloader['dataset'].update(root='$DENSEZOO_DATA/desnow')

# no published figure; not trained here
