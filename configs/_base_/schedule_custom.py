"""Fine-tuning on data of your own: AdamW with layer-wise decay, warm-up, cosine decay, an average of the weights."""

from mmengine.hooks import EMAHook
from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.runner import ValLoop
from torch.optim import AdamW

from densezoo.train import IterLoop, OptimWrapper

max_iters = 10000

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=2e-4, weight_decay=0.05),
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(layer_decay=0.9),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type=CosineAnnealingLR, eta_min=1e-6, by_epoch=False, begin=500, end=max_iters, T_max=max_iters - 500),
]
train_cfg = dict(type=IterLoop, max_iters=max_iters, val_interval=1000)
val_cfg = dict(type=ValLoop)
custom_hooks = [dict(type=EMAHook, momentum=0.001)]
