"""Semantic segmentation of your pictures: <root>/images/{train,val}, <root>/masks/{train,val}, <root>/classes.txt."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import CropWithoutOneClassDominating, MaskFolder, ResizeImageOnly, ResizeRange
from densezoo.heads import FPN, SemanticFPN
from densezoo.train import Preprocess, Segmentor
from densezoo.train.evaluators import SegmentationMetric

with read_base():
    from .._base_.schedule_custom import *

model = dict(
    type=Segmentor,
    backbone=dict(type=create_model, name='caformer_s18', pretrained=True, features_only=True),
    neck=dict(type=FPN, out_channels=256),
    head=dict(type=SemanticFPN, num_classes=10),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    dataset=dict(
        type=MaskFolder,
        root='data',
        split='train',
        transforms=[
            dict(type=ResizeRange, short=512, long=2048, ratio=(0.5, 2.0)),
            dict(type=CropWithoutOneClassDominating, size=(512, 512), cat_max_ratio=0.75),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandomPhotometricDistort),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(
        type=MaskFolder, root='data', split='val', transforms=[dict(type=ResizeImageOnly, short=512, long=2048)]
    ),
)
val_evaluator = dict(type=SegmentationMetric)
