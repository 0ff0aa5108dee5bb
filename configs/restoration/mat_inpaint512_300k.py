"""MAT on clean pictures with large holes, 512 x 512, by reconstruction alone (the paper trains it as a GAN)."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.data import CleanFolder, Holes, RandomCrop
from densezoo.heads import MAT, OwnRestorer
from densezoo.train import Preprocess, Restorer

with read_base():
    from .._base_.restoration_300k import *

model = dict(
    type=Restorer,
    backbone=dict(type=MAT),
    head=dict(type=OwnRestorer, holes=True),
    preprocess=dict(type=Preprocess),
)
holes = dict(type=Holes, share=(0.1, 0.8))
train_dataloader['dataset'].update(
    type=CleanFolder,
    root='$DENSEZOO_DATA/places',
    degrade=holes,
    transforms=[dict(type=RandomCrop, size=512), dict(type=v2.RandomHorizontalFlip)],
)
val_dataloader['dataset'].update(type=CleanFolder, root='$DENSEZOO_DATA/places', degrade=holes)
val_evaluator.update(y_channel=False, baselines=('telea',))

# no published PSNR (the paper states FID, of its GAN); not trained here
