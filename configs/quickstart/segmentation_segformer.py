"""quickstart/segmentation with SegFormer's head in place of FPN and Semantic FPN."""

from mmengine.config import read_base

from densezoo.heads import SegFormerHead

with read_base():
    from .segmentation import *

model['neck'] = None
model['head'] = dict(
    type=SegFormerHead,
    num_classes=11,
    channels=96,
    dropout=0.0,
    class_weight=(0.7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    dice_weight=1.0,
)
