"""CAFormer-S18 on ImageNet-1k: batch 4096, 20 epochs of warm-up.

Differs: AdamW 4e-3, as the authors train ConvFormer; they train CAFormer with LAMB 8e-3.
"""

from mmengine.config import read_base

with read_base():
    from .convformer_s18_imagenet_300e import *

model['backbone'].update(name='caformer_s18', drop_path_rate=0.15)

# published (LAMB): 83.6 top-1; not trained here
