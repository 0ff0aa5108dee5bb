"""The digits of `classification` with a small PVTv2 of full attention, in 1000 iterations: the first stage of
`classification_ecoformer`, and its full-precision parent.
"""

from mmengine.config import read_base

from densezoo.backbones import create_model

with read_base():
    from .classification import *

max_iters = 1000

# Keys and values of the map itself (no spatial reduction), as EcoFormer's authors prepare their models.
model['backbone'] = dict(
    type=create_model,
    name='pvt_v2_b0',
    num_classes=10,
    dims=(32, 64, 96, 128),
    num_heads=(1, 2, 3, 4),
    sr_ratios=1,
    depths=(1, 2, 2, 1),
    mlp_ratios=4,
    drop_path_rate=0.05,
)

train_cfg.update(max_iters=max_iters, val_interval=500)
param_scheduler[1].update(end=max_iters)
