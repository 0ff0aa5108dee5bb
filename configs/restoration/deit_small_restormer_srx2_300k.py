"""Super-resolution x2: Restormer's blocks as the decoder of DeiT (plain, a simple pyramid), on pictures made small."""

from mmengine.config import read_base

from densezoo.backbones import create_model

with read_base():
    from .swin_tiny_restormer_srx4_300k import *

model['backbone'] = dict(type=create_model, name='deit_small_patch16_224', features_only=True)
model['head'].update(scale=2)
train_dataloader['dataset']['degrade'].update(factor=2)
val_dataloader['dataset']['degrade'].update(factor=2)
val_evaluator.update(crop_border=2)

# no published figure; not trained here
