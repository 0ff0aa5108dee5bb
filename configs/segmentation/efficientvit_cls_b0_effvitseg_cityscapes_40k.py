"""EfficientViT's segmentation head on EfficientViT-B0, Cityscapes: 512 x 1024 crops, AdamW, 40k iterations.

The authors publish weights and figures, not their training; the schedule is ours.
"""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.data import Cityscapes, CropWithoutOneClassDominating, ResizeImageOnly, ResizeRange
from densezoo.heads import EfficientViTSeg
from densezoo.train import Preprocess, Segmentor

with read_base():
    from .._base_.ade20k_40k import *

root = '$DENSEZOO_DATA/cityscapes'

model = dict(
    type=Segmentor,
    backbone=dict(
        type=create_model, name='efficientvit_cls_b0', features_only=True, out_indices=(1, 2, 3), drop_path_rate=0.05
    ),
    head=dict(type=EfficientViTSeg, num_classes=19, channels=32, depth=1, ratio=4.0, final_ratio=4.0),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader['dataset'].update(type=Cityscapes, root=root)
train_dataloader['dataset']['transforms'][0].update(type=ResizeRange, short=1024, long=2048, ratio=(0.5, 2.0))
train_dataloader['dataset']['transforms'][1].update(type=CropWithoutOneClassDominating, size=(512, 1024))
val_dataloader['dataset'].update(
    type=Cityscapes, root=root, transforms=[dict(type=ResizeImageOnly, short=1024, long=2048)]
)
optim_wrapper['optimizer'].update(lr=1e-3, weight_decay=0.05)

# published: 75.653 mIoU at 1024 x 2048; not trained here
