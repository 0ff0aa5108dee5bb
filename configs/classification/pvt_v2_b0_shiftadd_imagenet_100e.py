"""ShiftAddViT on PVTv2-B0 and ImageNet-1k, from `pvt_v2_b0_msa_imagenet_100e`; 100 epochs, AdamW 1e-5 for 512 images.

The authors train attention first (5e-5, `attention_layers='dense', mlp_layers='dense'`), then with mixtures of linear
layers from there, at 1e-5; this is both at once. Their code leaves the balancing loss out, and gates without gradient.
"""

from mmengine.config import read_base

from densezoo.backbones.binary import create_binary

with read_base():
    from .pvt_v2_b0_ecoformer_imagenet_30e import *

epochs = 100

model['backbone'] = dict(
    type=create_binary,
    name='pvt_v2_b0',
    drop_path_rate=0.1,
    method='shiftadd',
    settings=dict(attention_layers='mixture', mlp_layers='mixture', gate='noisy'),
)
optim_wrapper['optimizer'].update(lr=1e-5 * 256 / 512)
param_scheduler[0].update(start_factor=5e-8 / 1e-5)
param_scheduler[1].update(eta_min=5e-7 * 256 / 512, end=epochs, T_max=epochs - 5)
train_cfg.update(max_epochs=epochs)

# published: figures of the paper not verified, none in the authors' repository; not trained here
