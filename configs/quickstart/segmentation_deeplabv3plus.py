"""quickstart/segmentation with a small DeepLabV3+ on the maps of strides 4 and 16."""

from mmengine.config import read_base

from densezoo.heads import DeepLabV3Plus

with read_base():
    from .segmentation import *

model['backbone'].update(out_indices=(0, 2))
model['neck'] = None
model['head'] = dict(
    type=DeepLabV3Plus,
    num_classes=11,
    channels=96,
    low_channels=24,
    dilations=(1, 2, 4),  # the last map is 6 x 6
    dropout=0.0,
    class_weight=(0.7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    dice_weight=1.0,
)
