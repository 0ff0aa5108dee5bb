"""ConvFormer-S18 on ImageNet-1k: the authors' recipe (batch 4096, AdamW 4e-3, 20 epochs of warm-up)."""

from mmengine.config import read_base

with read_base():
    from .poolformer_s12_imagenet_300e import *

model['backbone'].update(name='convformer_s18', drop_path_rate=0.2)
# 8 GPUs of 128 images, four steps accumulated: 4096
optim_wrapper.update(accumulative_counts=4)
optim_wrapper['optimizer'].update(lr=4e-3)
param_scheduler[0].update(end=20)
param_scheduler[1].update(begin=20, T_max=epochs - 20)
val_dataloader['dataset']['transforms'][0].update(size=224)  # crop_pct 1.0

# published: 83.0 top-1; not trained here
