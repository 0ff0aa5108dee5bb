"""quickstart/detection with GFL: scores that rank by IoU, sides as distributions."""

from mmengine.config import read_base

from densezoo.heads import FPN, GFL

with read_base():
    from .detection import *

max_iters = 3000

model['backbone'].update(out_indices=(1, 2, 3))
# Item by item: `update` would merge into the other head's arguments.
model['neck'] = dict(type=FPN, out_channels=96)
# Digits of 22 to 44 pixels: anchors of 32 on the stride-8 map.
model['head'] = dict(type=GFL, num_classes=10, num_convs=2, anchor_scale=4.0)

train_cfg.update(max_iters=max_iters, val_interval=1500)
param_scheduler[1].update(end=max_iters)
