"""COCO 2017 for DETR: 150 epochs, batch 16, AdamW 1e-4 (the backbone's 1e-5), clipped at 0.1, 480 to 800 pixels.

Differs from the authors' recipe: no random crops before resizing.
"""

from mmengine.config import read_base

with read_base():
    from .coco_1x import *

epochs = 150

train_dataloader['dataset']['transforms'][0].update(short=(480, 800))
optim_wrapper.update(clip_grad=dict(max_norm=0.1), paramwise_cfg=dict(backbone_scale=0.1))
param_scheduler[1].update(end=epochs, milestones=[100])
train_cfg.update(max_epochs=epochs, val_interval=5)
