"""quickstart/detection with Cascade R-CNN: three stages of boxes."""

from mmengine.config import read_base

from densezoo.heads import CascadeRCNN

with read_base():
    from .detection import *

model['head'] = dict(
    type=CascadeRCNN,
    num_classes=10,
    masks=False,
    box_channels=256,
    rpn_pre_nms=(200, 200),
    rpn_post_nms=(100, 50),
    roi_batch=64,
)
