"""quickstart/detection with DETR on the stride-8 map. It learns slowly: minutes do not bring it to others' figures."""

from mmengine.config import read_base

from densezoo.heads import DETR

with read_base():
    from .detection import *

max_iters = 3000

model['backbone'].update(out_indices=(1,))
model['neck'] = None
model['head'] = dict(
    type=DETR,
    num_classes=10,
    channels=96,
    num_heads=4,
    hidden=192,
    # Two to five objects on a small picture.
    num_queries=20,
    encoder_layers=2,
    decoder_layers=3,
    dropout=0.0,
)

optim_wrapper['optimizer'].update(lr=1e-3)
train_cfg.update(max_iters=max_iters, val_interval=1500)
param_scheduler[1].update(end=max_iters)
