"""The digits of `classification` with a small Swin, in 1000 iterations: the full-precision teacher of
`classification_bivit`.
"""

from mmengine.config import read_base

from densezoo.backbones import create_model

with read_base():
    from .classification import *

max_iters = 1000

# Strides of 4 to 32 leave 8 x 8, 4 x 4, 2 x 2 and 1 x 1 tokens of a 32x32 scan.
model['backbone'] = dict(
    type=create_model,
    name='swin_tiny_patch4_window7_224',
    num_classes=10,
    dims=(32, 64, 128, 192),
    depths=(1, 2, 2, 1),
    num_heads=(1, 2, 4, 6),
    window_size=4,
    drop_path_rate=0.05,
)

train_cfg.update(max_iters=max_iters, val_interval=500)
param_scheduler[1].update(end=max_iters)
