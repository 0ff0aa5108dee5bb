"""The Swin of `classification_swin` made binary by BiViT, taught by itself in full precision; train that one first.

    densezoo train quickstart/classification_swin && densezoo train quickstart/classification_bivit

Weights and the whole of attention have one bit: attention from the start, MLPs after 0.3 of the run. The stem, the
layers between stages, the norms and the classifier stay as they are.
"""

from mmengine.config import read_base

from densezoo.backbones.binary import create_binary
from densezoo.train import DistilledClassifier
from densezoo.train.hooks import BinarySchedule

with read_base():
    from .classification_swin import *

max_iters = 400

model.update(
    type=DistilledClassifier,
    teacher=model['backbone'],
    checkpoint='work_dirs/classification_swin/best.pth',
    start=True,
    logits=1.0,
    features=1.0,
)
model['backbone'] = dict(
    type=create_binary,
    name='swin_tiny_patch4_window7_224',
    num_classes=10,
    dims=(32, 64, 128, 192),
    depths=(1, 2, 2, 1),
    num_heads=(1, 2, 4, 6),
    window_size=4,
    method='bivit',
)
custom_hooks = [dict(type=BinarySchedule, attention=0.0, mlp=0.3)]

train_cfg.update(max_iters=max_iters, val_interval=100)
param_scheduler[0].update(end=40)
param_scheduler[1].update(begin=40, end=max_iters)
