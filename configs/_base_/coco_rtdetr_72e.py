"""COCO 2017 for RT-DETR: 72 epochs, batch 16, AdamW 1e-4 (the backbone's 1e-5), clipped at 0.1, 640 x 640 pixels.

Differs from the authors' recipe: a step at epoch 64 takes the place of the average of weights; no zooming out.
"""

from mmengine.config import read_base
from torchvision.transforms import v2

with read_base():
    from .coco_detr_150e import *

epochs = 72

train_dataloader['dataset'].update(
    transforms=[
        dict(type=v2.RandomPhotometricDistort, p=0.8),
        dict(type=v2.RandomIoUCrop),
        dict(type=v2.SanitizeBoundingBoxes),
        dict(type=v2.RandomHorizontalFlip),
        dict(type=v2.Resize, size=(640, 640)),
    ]
)
val_dataloader['dataset'].update(transforms=[dict(type=v2.Resize, size=(640, 640))])
param_scheduler[0].update(end=2000)
param_scheduler[1].update(end=epochs, milestones=[64])
train_cfg.update(max_epochs=epochs, val_interval=2)
