"""Instance masks of handwritten digits on photographs with a small CAFormer, FPN and Mask R-CNN."""

from mmengine.config import read_base

from densezoo.heads import FPN, MaskRCNN
from densezoo.train.evaluators import CocoMetric

with read_base():
    from .detection import *

max_iters = 1200

# Item by item: `update` would merge into FCOS's arguments.
model['neck'] = dict(type=FPN, out_channels=96)
model['head'] = dict(type=MaskRCNN, num_classes=10)
model['backbone'].update(out_indices=(0, 1, 2, 3))
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator = dict(type=CocoMetric, iou_types=('bbox', 'segm'))

train_cfg.update(max_iters=max_iters, val_interval=600)
param_scheduler[1].update(end=max_iters)
