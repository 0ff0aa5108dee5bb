"""DeiT-S with Sparsifiner, a quarter of the connections: the second of two phases.

The first one trains the predictors, beside a backbone that attends to everything:

    --cfg-options model.backbone.reduction.reconstruction=0.01

ReducedClassifier adds that loss. The authors give 5 of 50 epochs to it, from trained weights, and distil.
"""

from mmengine.config import read_base

from densezoo.train import ReducedClassifier

with read_base():
    from .deit_small_imagenet_300e import *

model.update(type=ReducedClassifier)
model['backbone'].update(reduction=dict(type='sparsifiner', keep=0.25, reconstruction=0.0))

# the published figure is of 50 epochs from DeiT-S with distillation; not trained here
