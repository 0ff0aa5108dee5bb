"""quickstart/segmentation with a small UPerNet and an auxiliary FCN in place of FPN and Semantic FPN."""

from mmengine.config import read_base

from densezoo.heads import FCN, UPerNet

with read_base():
    from .segmentation import *

max_iters = 2400

model['neck'] = None
model['head'] = dict(
    type=UPerNet,
    num_classes=11,
    channels=64,
    pool_scales=(1, 2, 3),  # the last map is 3 x 3
    dropout=0.0,
    class_weight=(0.7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    dice_weight=1.0,
)
model['auxiliary'] = dict(fcn=dict(type=FCN, num_classes=11, channels=64, loss_weight=0.4))

train_cfg.update(max_iters=max_iters, val_interval=1200)
param_scheduler[1].update(end=max_iters)
