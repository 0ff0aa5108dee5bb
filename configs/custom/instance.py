"""Instance masks from your COCO JSON with Mask R-CNN; the folders are custom/detection's."""

from mmengine.config import read_base

from densezoo.heads import FPN, MaskRCNN

with read_base():
    from .detection import *

# Item by item: `update` would merge into FCOS's arguments.
model['neck'] = dict(type=FPN, out_channels=256, extra='maxpool')
model['head'] = dict(type=MaskRCNN, num_classes=10)
model['backbone'].update(out_indices=(0, 1, 2, 3))
train_dataloader['dataset'].update(masks=True)
val_dataloader['dataset'].update(masks=True)
val_evaluator.update(iou_types=('bbox', 'segm'))
