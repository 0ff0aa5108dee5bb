"""AdamW with a short linear warm-up and a linear decay to zero, for trainings of minutes on a CPU.

A config that changes `max_iters` states it in three places (loop, decay, validation interval): a value derived in a
config file is not recomputed after an override.
"""

from mmengine.optim import LinearLR
from mmengine.runner import ValLoop
from torch.optim import AdamW

from densezoo.train import IterLoop, OptimWrapper

max_iters = 2000
warmup = 100

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05, fused=True),
    constructor='LayerDecayConstructor',
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.02, by_epoch=False, begin=0, end=warmup),
    dict(type=LinearLR, start_factor=1.0, end_factor=0.001, by_epoch=False, begin=warmup, end=max_iters),
]
train_cfg = dict(type=IterLoop, max_iters=max_iters, val_interval=500)
val_cfg = dict(type=ValLoop)
