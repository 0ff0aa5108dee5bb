"""ADE20K for 160k iterations of batch 16, as UPerNet and SegFormer are trained: AdamW 6e-5, warm-up, linear decay."""

from mmengine.config import read_base
from mmengine.optim import LinearLR, PolyLR

with read_base():
    from .ade20k_40k import *

max_iters = 160000
warmup = 1500

train_dataloader['batch_size'] = 2  # on each of 8 GPUs: 16
optim_wrapper['optimizer'].update(lr=6e-5, weight_decay=0.01)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-6, by_epoch=False, begin=0, end=warmup),
    dict(type=PolyLR, power=1.0, eta_min=0.0, by_epoch=False, begin=warmup, end=max_iters),
]
train_cfg.update(max_iters=max_iters, val_interval=16000)
