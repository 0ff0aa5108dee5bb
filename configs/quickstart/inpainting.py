"""Large holes in photographs filled by a small ConvFormer under Restormer's blocks, which see the whole picture."""

from mmengine.config import read_base

from densezoo.data.holes import Holes

with read_base():
    from .restoration import *

model['backbone'].update(in_chans=4)
model['head'].update(block='restormer', holes=True, loss='l1')

holes = dict(type=Holes, share=(0.1, 0.4))
train_dataloader['dataset']['degrade'] = holes
val_dataloader['dataset']['degrade'] = holes
val_evaluator.update(baselines=('input', 'telea'))
