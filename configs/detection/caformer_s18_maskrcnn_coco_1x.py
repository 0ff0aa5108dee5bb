"""Mask R-CNN on CAFormer-S18, COCO 1x: PoolFormer's recipe with stochastic depth.

The authors publish dense results of this family with other heads and schedules; this recipe is ours.
"""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_maskrcnn_coco_1x import *

model['backbone'].update(name='caformer_s18', drop_path_rate=0.2)
optim_wrapper['optimizer'].update(weight_decay=0.05)

# no published figure; not trained here
