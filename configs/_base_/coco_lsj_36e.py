"""COCO 2017 for 36 epochs ("3x") with large-scale jittering to 1024 x 1024 and masks: batch 16, AdamW 1e-4 with a layer
decay of 0.8, as ViTDet trains plain backbones (Li et al. 2022, arXiv:2203.16527; there 100 epochs of batch 64)."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.data import LargeScaleJitter

with read_base():
    from .coco_1x import *

epochs = 36

train_dataloader['dataset'].update(
    masks=True,
    transforms=[dict(type=LargeScaleJitter), dict(type=v2.RandomHorizontalFlip)],
)
val_dataloader['dataset'].update(masks=True, transforms=[dict(type=ResizeRange, short=1024, long=1024)])
val_evaluator.update(iou_types=('bbox', 'segm'))
optim_wrapper['optimizer'].update(weight_decay=0.1)
optim_wrapper.update(paramwise_cfg=dict(layer_decay=0.8))
param_scheduler[1].update(end=epochs, milestones=[32, 35])
train_cfg.update(max_epochs=epochs, val_interval=3)
