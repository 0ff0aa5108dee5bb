"""Restormer on clean pictures with Gaussian noise of sigma 25 of 255: DIV2K, Flickr2K, BSD500, WED in the paper."""

from mmengine.config import read_base

from densezoo.data import CleanFolder, GaussianNoise
from densezoo.heads import OwnRestorer, Restormer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=Restormer, norm='bias_free'),
    head=dict(type=OwnRestorer),
    preprocess=dict(type=Preprocess),
)
noise = dict(type=GaussianNoise, sigma=25, clip=False)
train_dataloader['dataset'].update(type=CleanFolder, root='$DENSEZOO_DATA/denoise', degrade=noise)
val_dataloader['dataset'].update(type=CleanFolder, root='$DENSEZOO_DATA/denoise', degrade=noise)
val_evaluator.update(y_channel=False)

# published figures: tables of arXiv 2111.09881; not trained here
