"""Noise, haze, rain and blur in one network: a small TAT makes kernels for each picture and balances tasks."""

from mmengine.config import read_base

from densezoo.data.degradations import Blur, GaussianNoise, Haze, Rain, RandomDegrade
from densezoo.heads import TAT, OwnRestorer

with read_base():
    from .restoration import *

max_iters = 1000

model['backbone'] = dict(type=TAT, dim=16, depths=(1, 1, 1, 1), refinement=1, in_chans=3, out_chans=3)
model['head'] = dict(type=OwnRestorer, loss='balanced')

everything = dict(
    type=RandomDegrade,
    steps=[dict(type=GaussianNoise, sigma=25), dict(type=Haze), dict(type=Rain), dict(type=Blur)],
)
train_dataloader['dataset']['degrade'] = everything
val_dataloader['dataset']['degrade'] = everything
val_evaluator.update(baselines=('input',))

optim_wrapper['optimizer'].update(lr=1e-3)
train_cfg.update(max_iters=max_iters, val_interval=500)
param_scheduler[1].update(end=max_iters)
