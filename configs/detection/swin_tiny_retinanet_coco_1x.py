"""RetinaNet on Swin-T, COCO 1x (AdamW 1e-4, weight decay 0.05, batch 16)."""

from mmengine.config import read_base

from densezoo.heads import FPN, RetinaNet

with read_base():
    from .swin_tiny_atss_coco_1x import *

model['neck'] = dict(type=FPN, out_channels=256, extra='p6p7', extra_source='input', extra_relu=False)
model['head'] = dict(type=RetinaNet, num_classes=80)
optim_wrapper['optimizer'].update(weight_decay=0.05)

# published with Mask R-CNN: 42.7 box AP, with RetinaNet not by the authors; not trained here
