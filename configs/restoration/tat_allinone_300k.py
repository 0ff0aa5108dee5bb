"""TAT on noise, haze, rain, snow, blur and JPEG at once, in colour; its paper restores PET, CT and MRI."""

from mmengine.config import read_base

from densezoo.data import JPEG, Blur, CleanFolder, GaussianNoise, Haze, Rain, RandomDegrade, Snow
from densezoo.heads import TAT, OwnRestorer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=TAT, in_chans=3, out_chans=3),
    head=dict(type=OwnRestorer, loss='balanced'),
    preprocess=dict(type=Preprocess),
)
everything = dict(
    type=RandomDegrade,
    steps=[
        dict(type=GaussianNoise, sigma=(10, 50)),
        dict(type=Haze),
        dict(type=Rain),
        dict(type=Snow),
        dict(type=Blur, kind='motion'),
        dict(type=JPEG),
    ],
)
train_dataloader['dataset'].update(type=CleanFolder, root='$DENSEZOO_DATA/clean', degrade=everything)
val_dataloader['dataset'].update(type=CleanFolder, root='$DENSEZOO_DATA/clean', degrade=everything)
val_evaluator.update(y_channel=False)

# no published figure for these tasks; not trained here
