"""Restoration from your pairs: <root>/{train,val}/input and <root>/{train,val}/target, pictures of equal names."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import PairedFolder, RandomCrop
from densezoo.heads import UNetRestorer
from densezoo.train import Preprocess, Restorer
from densezoo.train.evaluators import RestorationMetric

with read_base():
    from .._base_.schedule_custom import *

model = dict(
    type=Restorer,
    backbone=dict(type=create_model, name='convformer_s18', pretrained=True, features_only=True),
    head=dict(type=UNetRestorer, channels=32),
    preprocess=dict(type=Preprocess),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    dataset=dict(
        type=PairedFolder,
        root='data',
        split='train',
        transforms=[
            dict(type=RandomCrop, size=128),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandomVerticalFlip),
        ],
    ),
)
val_dataloader = dict(batch_size=1, num_workers=4, dataset=dict(type=PairedFolder, root='data', split='val'))
val_evaluator = dict(type=RestorationMetric, baselines=('input',))
