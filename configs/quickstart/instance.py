"""Instance masks of handwritten digits on photographs with a small CAFormer, FPN and Mask R-CNN."""

from mmengine.config import read_base

from densezoo.heads import FPN, MaskRCNN
from densezoo.train.evaluators import CocoMetric

with read_base():
    from .detection import *

max_iters = 1100

# Item by item: `update` would merge into FCOS's arguments.
model['neck'] = dict(type=FPN, out_channels=64)
# Two to five objects on a small picture: a few hundred regions are plenty.
model['head'] = dict(
    type=MaskRCNN,
    num_classes=10,
    box_channels=256,
    mask_channels=64,
    mask_convs=2,
    rpn_pre_nms=(200, 200),
    rpn_post_nms=(100, 50),
    roi_batch=64,
)
model['backbone'].update(out_indices=(0, 1, 2, 3))
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator = dict(type=CocoMetric, iou_types=('bbox', 'segm'))

train_cfg.update(max_iters=max_iters, val_interval=550)
param_scheduler[1].update(end=max_iters)
