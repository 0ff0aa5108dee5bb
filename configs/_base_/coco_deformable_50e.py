"""COCO 2017 for Deformable DETR: 50 epochs, batch 32, AdamW 2e-4 (the backbone's 2e-5), clipped at 0.1, 480 to 800
pixels.

Differs from the authors' recipe: no random crops before resizing; all of the head learns at one rate (there, sampling
offsets and reference points at a tenth).
"""

from mmengine.config import read_base

with read_base():
    from .coco_detr_150e import *

epochs = 50

train_dataloader.update(batch_size=4)  # on each of 8 GPUs: 32
optim_wrapper['optimizer'].update(lr=2e-4)
param_scheduler[1].update(end=epochs, milestones=[40])
train_cfg.update(max_epochs=epochs, val_interval=1)
