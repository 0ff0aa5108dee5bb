"""Large holes in photographs filled by a small MAT: attention to known pixels alone, holes close from their rims."""

from mmengine.config import read_base

from densezoo.data.holes import Holes
from densezoo.heads import MAT, OwnRestorer

with read_base():
    from .restoration import *

max_iters = 1500

model['backbone'] = dict(type=MAT, resolution=128, dim=24, channels=32, w_dim=32, z_dim=32, num_heads=3)
model['head'] = dict(type=OwnRestorer, holes=True, loss='l1')

holes = dict(type=Holes, share=(0.1, 0.4))
train_dataloader.update(batch_size=4)
train_dataloader['dataset']['degrade'] = holes
train_dataloader['dataset']['transforms'][0].update(size=128)
val_dataloader['dataset']['degrade'] = holes
val_evaluator.update(baselines=('input', 'telea'))

train_cfg.update(max_iters=max_iters, val_interval=500)
param_scheduler[1].update(end=max_iters)
