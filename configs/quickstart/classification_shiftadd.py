"""ShiftAddViT: the PVTv2 of `classification_pvt` without most of its multiplications, taught by itself in full
precision; train that one first.

    densezoo train quickstart/classification_pvt && densezoo train quickstart/classification_shiftadd

Queries and keys are binary codes, the linear layers of attention are shifts, and a gate sends each token through an MLP
of multiplications or of shifts; the balancing loss weighs the two by their latencies.
"""

from mmengine.config import read_base

from densezoo.backbones.binary import create_binary

with read_base():
    from .classification_ecoformer import *

max_iters = 300

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
    method='shiftadd',
    settings=dict(attention_layers='shift', mlp_layers='mixture', gate='noisy'),
)

train_cfg.update(max_iters=max_iters)
param_scheduler[1].update(end=max_iters)
