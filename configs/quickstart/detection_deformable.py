"""quickstart/detection with Deformable DETR: box refinement, two stages, no suppression."""

from mmengine.config import read_base

from densezoo.heads import DeformableDETR

with read_base():
    from .detection import *

max_iters = 2500

model['backbone'].update(out_indices=(1, 2, 3))
model['neck'] = None
model['head'] = dict(
    type=DeformableDETR,
    num_classes=10,
    num_levels=3,
    channels=96,
    num_heads=4,
    hidden=192,
    # Two to five objects on a small picture.
    num_queries=30,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
    refine=True,
    two_stages=True,
)

optim_wrapper['optimizer'].update(lr=1e-3)
train_cfg.update(max_iters=max_iters, val_interval=1250)
param_scheduler[1].update(end=max_iters)
