"""Gaussian denoising (sigma 25 of 255) with a U-shaped decoder on ConvFormer-S18; a folder of clean pictures.

Train on what you have under denoise/train (DIV2K, Flickr2K, BSD400, WED in the literature), test on denoise/val.
"""

from mmengine.optim import CosineAnnealingLR
from mmengine.runner import ValLoop
from torch.optim import AdamW
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import CleanFolder, GaussianNoise, RandomCrop
from densezoo.heads import UNetRestorer
from densezoo.train import IterLoop, OptimWrapper, Preprocess, Restorer
from densezoo.train.evaluators import RestorationMetric

max_iters = 100000

model = dict(
    type=Restorer,
    backbone=dict(type=create_model, name='convformer_s18', features_only=True),
    head=dict(type=UNetRestorer, channels=48, blocks=(2, 2, 2), loss='charbonnier'),
    preprocess=dict(type=Preprocess),
)
train_dataloader = dict(
    batch_size=4,  # on each of 8 GPUs: 32
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    dataset=dict(
        type=CleanFolder,
        root='$DENSEZOO_DATA/denoise',
        split='train',
        transforms=[
            dict(type=RandomCrop, size=192),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandomVerticalFlip),
        ],
        degrade=dict(type=GaussianNoise, sigma=25),
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(
        type=CleanFolder, root='$DENSEZOO_DATA/denoise', split='val', degrade=dict(type=GaussianNoise, sigma=25)
    ),
)
val_evaluator = dict(type=RestorationMetric, baselines=('input',))
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.9)),
    constructor='LayerDecayConstructor',
    clip_grad=dict(max_norm=0.1),
)
param_scheduler = [dict(type=CosineAnnealingLR, eta_min=1e-6, by_epoch=False, begin=0, end=max_iters, T_max=max_iters)]
train_cfg = dict(type=IterLoop, max_iters=max_iters, val_interval=10000)
val_cfg = dict(type=ValLoop)

# no published figure; not trained here
