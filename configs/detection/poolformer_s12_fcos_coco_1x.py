"""FCOS with the improvements of its second paper on PoolFormer-S12, COCO 1x (AdamW 1e-4, batch 16)."""

from mmengine.config import read_base

from densezoo.heads import FCOS

with read_base():
    from .poolformer_s12_atss_coco_1x import *

model['head'] = dict(
    type=FCOS,
    num_classes=80,
    point_offset=0.5,
    exact_strides=True,
    scales=True,
    weigh_boxes=True,
    product=True,
    score_threshold=0.05,
)

# published for ResNet-50 (MMDetection): 38.7 AP; with this backbone none; not trained here
