"""RandFormer-S12 on ImageNet-1k: the authors' recipe (batch 4096, AdamW 4e-3, 5 epochs of warm-up)."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_imagenet_300e import *

model['backbone'].update(name='randformer_s12', drop_path_rate=0.1)
# 8 GPUs of 128 images, four steps accumulated: 4096
optim_wrapper.update(accumulative_counts=4)
optim_wrapper['optimizer'].update(lr=4e-3)
val_dataloader['dataset']['transforms'][0].update(size=224)  # crop_pct 1.0

# published: 76.6 top-1; not trained here
