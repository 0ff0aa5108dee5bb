"""EcoFormer's second stage: the PVTv2 of `classification_pvt` with attention of learned binary codes, taught by itself
with softmax attention; train that one first.

    densezoo train quickstart/classification_pvt && densezoo train quickstart/classification_ecoformer

Attention of stages 1 to 3 is linear in the number of tokens and its products of codes are sums; the last stage keeps
its softmax. The first iteration learns the hash functions from the attention map.
"""

from mmengine.config import read_base

from densezoo.backbones.binary import create_binary
from densezoo.train import DistilledClassifier

with read_base():
    from .classification_pvt import *

max_iters = 400

model.update(
    type=DistilledClassifier,
    teacher=model['backbone'],
    checkpoint='work_dirs/classification_pvt/best.pth',
    start=True,
)
model['backbone'] = dict(
    type=create_binary,
    name='pvt_v2_b0',
    num_classes=10,
    dims=(32, 64, 96, 128),
    num_heads=(1, 2, 3, 4),
    sr_ratios=1,
    depths=(1, 2, 2, 1),
    mlp_ratios=4,
    drop_path_rate=0.05,
    method='ecoformer',
)

optim_wrapper['optimizer'].update(lr=1e-3)  # a fine-tuning
train_cfg.update(max_iters=max_iters, val_interval=100)
param_scheduler[0].update(end=40)
param_scheduler[1].update(begin=40, end=max_iters)
