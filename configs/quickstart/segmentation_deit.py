"""The digits of `segmentation` with a small DeiT, from scratch: what `segmentation_mctf` has all tokens of."""

from mmengine.config import read_base

from densezoo.backbones import create_model

with read_base():
    from .segmentation import *

max_iters = 3000  # attention starts slowly: 400 iterations of these pass before digits are told apart

# Patches of 8 pixels, 144 tokens of a picture of 96 x 96: the strokes of a digit are 5 wide.
model['backbone'] = dict(
    type=create_model,
    name='deit_tiny_patch16_224',
    features_only=True,
    img_size=96,
    patch_size=8,
    depth=8,
    dim=128,
    num_heads=4,
)

optim_wrapper['optimizer'].update(lr=1e-3)
train_cfg.update(max_iters=max_iters, val_interval=1500)
param_scheduler[1].update(end=max_iters)
