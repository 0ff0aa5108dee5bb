"""Mask R-CNN on CrossFormer++-S, COCO 1x: the authors' recipe (AdamW 1e-4, batch 16).

The weights lie on a drive: download them and pass their path as `checkpoint_path` to the backbone.
"""

from mmengine.config import read_base

from densezoo.backbones import create_model
from densezoo.heads import FPN, MaskRCNN
from densezoo.train import Detector, Preprocess

with read_base():
    from .._base_.coco_1x import *

model = dict(
    type=Detector,
    backbone=dict(
        type=create_model,
        name='crossformer_pp_small',
        pretrained=False,
        features_only=True,
        drop_path_rate=0.2,
    ),
    neck=dict(type=FPN, out_channels=256, extra='maxpool'),
    head=dict(type=MaskRCNN, num_classes=80),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator.update(iou_types=('bbox', 'segm'))

# published: 46.4 box AP, 42.1 mask AP; not trained here
