"""Handwritten digits on photographs (96x96, a genuine COCO dataset): a small CAFormer, FPN and Faster R-CNN."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import CocoDetection
from densezoo.heads import FPN, MaskRCNN
from densezoo.train import Detector, Preprocess
from densezoo.train.evaluators import CocoMetric

with read_base():
    from .._base_.schedule_quickstart import *

max_iters = 1500

model = dict(
    type=Detector,
    backbone=dict(
        type=create_model,
        name='caformer_s18',
        features_only=True,
        dims=(32, 64, 160, 256),
        depths=(1, 2, 3, 1),
        # StarReLU squares its input: from small random weights it starts slowly, which minutes do not forgive.
        act='gelu',
        mixers=(dict(name='conv', act='gelu'), dict(name='conv', act='gelu'), 'attention', 'attention'),
    ),
    neck=dict(type=FPN, out_channels=64),
    # Two to five objects on a small picture: a few hundred regions are plenty.
    head=dict(
        type=MaskRCNN,
        num_classes=10,
        masks=False,
        box_channels=256,
        rpn_pre_nms=(200, 200),
        rpn_post_nms=(100, 50),
        roi_batch=64,
    ),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)

train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(
        type=CocoDetection,
        root='demo:detection',
        split='train',
        transforms=[dict(type=v2.ColorJitter, brightness=0.3, contrast=0.3)],
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    dataset=dict(type=CocoDetection, root='demo:detection', split='val'),
)
val_evaluator = dict(type=CocoMetric, iou_types=('bbox',))

train_cfg.update(max_iters=max_iters, val_interval=750)
param_scheduler[1].update(end=max_iters)
