"""quickstart/detection with FCOS, a one-stage head: twice the iterations for the same accuracy."""

from mmengine.config import read_base

from densezoo.heads import FCOS, FPN

with read_base():
    from .detection import *

max_iters = 3200

model['backbone'].update(out_indices=(1, 2, 3))
# Item by item: `update` would merge into the other head's arguments.
model['neck'] = dict(type=FPN, out_channels=96)
# Digits of 22 to 44 pixels: the stride-8 map decides, the coarser ones give it context.
model['head'] = dict(type=FCOS, num_classes=10, num_convs=2, score_threshold=0.05)

train_cfg.update(max_iters=max_iters, val_interval=1600)
param_scheduler[1].update(end=max_iters)
