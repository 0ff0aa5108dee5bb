"""Rain streaks and snow flakes taken off photographs: the quickstart's ConvFormer under Histoformer's blocks."""

from mmengine.config import read_base

from densezoo.data.degradations import Rain, RandomDegrade, Snow

with read_base():
    from .restoration import *

# 47.4 thousand multiply-adds per pixel, in `restoration_rainsnow_unet` 55.9
model['head'].update(block='histoformer', blocks=(0, 1, 1), pearson=0.1)

weather = dict(type=RandomDegrade, steps=[dict(type=Rain), dict(type=Snow)])
train_dataloader['dataset']['degrade'] = weather
val_dataloader['dataset']['degrade'] = weather
val_evaluator.update(baselines=('input', 'blur'))
