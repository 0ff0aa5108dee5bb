"""Photographs at twice their size: a small ConvFormer under Restormer's blocks, pixel shuffle at the end."""

from mmengine.config import read_base

from densezoo.data.degradations import Downscale

with read_base():
    from .restoration import *

model['head'].update(block='restormer', scale=2)

smaller = dict(type=Downscale, factor=2)
train_dataloader['dataset']['degrade'] = smaller
train_dataloader['dataset']['transforms'][0].update(size=128)
val_dataloader['dataset']['degrade'] = smaller
val_evaluator.update(baselines=('input',))  # the bicubic enlargement
