"""quickstart/detection with RetinaNet, for as many iterations as `detection_rtdetr`."""

from mmengine.config import read_base

from densezoo.heads import FPN, RetinaNet

with read_base():
    from .detection import *

max_iters = 1800

model['backbone'].update(out_indices=(1, 2, 3))
# Item by item: `update` would merge into the other head's arguments.
model['neck'] = dict(type=FPN, out_channels=96)
# Digits of 22 to 44 pixels: anchors of 32 to 50 on the stride-8 map.
model['head'] = dict(type=RetinaNet, num_classes=10, num_convs=2, norm='group')

train_cfg.update(max_iters=max_iters, val_interval=900)
param_scheduler[1].update(end=max_iters)
