"""PVTv2-B0 with full attention on ImageNet-1k, from its published weights: EcoFormer's and ShiftAddViT's first stage.

The authors' recipe: 8 GPUs of 32 images, AdamW 5e-5 for 512 images, 100 epochs. EcoFormer without stages of codes is
this model: keys and values at full resolution, spatial reductions dropped.
"""

from mmengine.config import read_base

from densezoo.backbones.binary import create_binary

with read_base():
    from .pvt_v2_b0_imagenet_300e import *

epochs = 100

model['backbone'] = dict(
    type=create_binary,
    name='pvt_v2_b0',
    pretrained=True,
    drop_path_rate=0.1,
    method='ecoformer',
    settings=dict(stages=()),
)
train_dataloader.update(batch_size=32)
optim_wrapper['optimizer'].update(lr=5e-5 * 256 / 512)
param_scheduler[0].update(start_factor=1e-7 / 5e-5)
param_scheduler[1].update(eta_min=1e-6 * 256 / 512, end=epochs, T_max=epochs - 5)
train_cfg.update(max_epochs=epochs)

# published: none for this stage; not trained here
