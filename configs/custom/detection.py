"""A detector on your COCO JSON: <root>/images/{train,val}/*.jpg, <root>/annotations/instances_{train,val}.json."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import CocoDetection, ResizeRange
from densezoo.heads import FCOS, FPN
from densezoo.train import Detector, Preprocess
from densezoo.train.evaluators import CocoMetric

with read_base():
    from .._base_.schedule_custom import *

model = dict(
    type=Detector,
    backbone=dict(type=create_model, name='caformer_s18', pretrained=True, features_only=True, out_indices=(1, 2, 3)),
    neck=dict(type=FPN, out_channels=256, extra='p6p7'),
    head=dict(type=FCOS, num_classes=10),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    dataset=dict(
        type=CocoDetection,
        root='data',
        split='train',
        transforms=[
            dict(type=ResizeRange, short=(416, 640), long=1024),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandomPhotometricDistort),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(
        type=CocoDetection, root='data', split='val', transforms=[dict(type=ResizeRange, short=640, long=1024)]
    ),
)
val_evaluator = dict(type=CocoMetric, iou_types=('bbox',))
