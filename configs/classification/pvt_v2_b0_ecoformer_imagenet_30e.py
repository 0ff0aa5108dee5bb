"""EcoFormer on PVTv2-B0 and ImageNet-1k, from `pvt_v2_b0_msa_imagenet_100e`: the authors' second stage, 30 epochs.

Without a teacher, as published: the full-precision model gives the start alone.
"""

from mmengine.config import read_base

from densezoo.backbones.binary import create_binary
from densezoo.train import DistilledClassifier

with read_base():
    from .pvt_v2_b0_msa_imagenet_100e import *

epochs = 30

model.update(
    type=DistilledClassifier,
    teacher=dict(type=create_binary, name='pvt_v2_b0', method='ecoformer', settings=dict(stages=())),
    checkpoint='work_dirs/pvt_v2_b0_msa_imagenet_100e/best.pth',
    start=True,
    logits=0.0,
)
model['backbone'] = dict(type=create_binary, name='pvt_v2_b0', drop_path_rate=0.1, method='ecoformer')
param_scheduler[1].update(end=epochs, T_max=epochs - 5)
train_cfg.update(max_epochs=epochs)

# published: 70.44 top-1; not trained here
