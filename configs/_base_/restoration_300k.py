"""Pairs of degraded and clean pictures, 300k iterations of batch 32 on 128 x 128 crops, L1: the recipe of Restormer and
Histoformer (AdamW 3e-4, constant for 92k, then a cosine to 1e-6) without their growing crops."""

from mmengine.optim import ConstantLR, CosineAnnealingLR
from mmengine.runner import ValLoop
from torch.optim import AdamW
from torchvision.transforms import v2

from densezoo.data import PairedFolder, RandomCrop
from densezoo.train import IterLoop, OptimWrapper
from densezoo.train.evaluators import RestorationMetric

constant = 92000
max_iters = 300000

train_dataloader = dict(
    batch_size=8,  # on each of 4 GPUs: 32
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    dataset=dict(
        type=PairedFolder,
        root='$DENSEZOO_DATA/pairs',
        split='train',
        transforms=[
            dict(type=RandomCrop, size=128),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandomVerticalFlip),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1, num_workers=4, dataset=dict(type=PairedFolder, root='$DENSEZOO_DATA/pairs', split='val')
)
val_evaluator = dict(type=RestorationMetric, y_channel=True, baselines=('input',))
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=3e-4, weight_decay=1e-4, betas=(0.9, 0.999)),
    constructor='LayerDecayConstructor',
    clip_grad=dict(max_norm=0.01),
)
param_scheduler = [
    dict(type=ConstantLR, factor=1.0, by_epoch=False, begin=0, end=constant),
    dict(
        type=CosineAnnealingLR,
        eta_min=1e-6,
        by_epoch=False,
        begin=constant,
        end=max_iters,
        T_max=max_iters - constant,
    ),
]
train_cfg = dict(type=IterLoop, max_iters=max_iters, val_interval=10000)
val_cfg = dict(type=ValLoop)
