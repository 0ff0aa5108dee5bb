"""quickstart/segmentation with SBCB: the backbone's maps learn where classes end too, in training alone."""

from mmengine.config import read_base

from densezoo.heads import SBCB

with read_base():
    from .segmentation import *

model['auxiliary'] = dict(boundary=dict(type=SBCB, num_classes=11, radius=1, loss_weight=1.0))
