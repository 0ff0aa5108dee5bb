"""Super-resolution x4: Restormer's blocks as the decoder of Swin (windows), on pictures made small."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import CleanFolder, Downscale, RandomCrop
from densezoo.heads import UNetRestorer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=create_model, name='swin_tiny_patch4_window7_224', features_only=True),
    head=dict(type=UNetRestorer, channels=32, blocks=(1, 2, 2), block='restormer', scale=4, loss='l1'),
    preprocess=dict(type=Preprocess),
)
smaller = dict(type=Downscale, factor=4)
train_dataloader['dataset'].update(
    type=CleanFolder,
    root='$DENSEZOO_DATA/div2k',
    degrade=smaller,
    transforms=[dict(type=RandomCrop, size=256), dict(type=v2.RandomHorizontalFlip), dict(type=v2.RandomVerticalFlip)],
)
val_dataloader['dataset'].update(type=CleanFolder, root='$DENSEZOO_DATA/div2k', degrade=smaller)
val_evaluator.update(crop_border=4)

# no published figure; not trained here
