"""Gaussian noise (sigma 25 of 255) taken off photographs by a small ConvFormer and a U-shaped decoder."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import CleanFolder, RandomCrop
from densezoo.data.degradations import GaussianNoise
from densezoo.heads import UNetRestorer
from densezoo.train import Preprocess, Restorer
from densezoo.train.evaluators import RestorationMetric

with read_base():
    from .._base_.schedule_quickstart import *

max_iters = 2000

model = dict(
    type=Restorer,
    backbone=dict(
        type=create_model,
        name='convformer_s18',
        features_only=True,
        out_indices=(0, 1, 2),
        dims=(48, 96, 128, 160),
        depths=(1, 1, 2, 1),
    ),
    head=dict(type=UNetRestorer, channels=24, loss='charbonnier'),
    preprocess=dict(type=Preprocess),
)

train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(
        type=CleanFolder,
        root='demo:restoration',
        split='train',
        transforms=[
            dict(type=RandomCrop, size=64),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandomVerticalFlip),
            dict(type=v2.RandomChannelPermutation),
        ],
        degrade=dict(type=GaussianNoise, sigma=25),
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(type=CleanFolder, root='demo:restoration', split='val', degrade=dict(type=GaussianNoise, sigma=25)),
)
val_evaluator = dict(type=RestorationMetric, baselines=('input', 'blur', 'nlm'))

train_cfg.update(max_iters=max_iters, val_interval=1000)
param_scheduler[1].update(end=max_iters)
