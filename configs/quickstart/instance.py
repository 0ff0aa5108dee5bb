"""Instance masks of handwritten digits on photographs: quickstart/detection with the mask branch of Mask R-CNN."""

from mmengine.config import read_base

with read_base():
    from .detection import *

max_iters = 1100

model['head'].update(masks=True, mask_channels=64, mask_convs=2)
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator.update(iou_types=('bbox', 'segm'))

train_cfg.update(max_iters=max_iters, val_interval=550)
param_scheduler[1].update(end=max_iters)
