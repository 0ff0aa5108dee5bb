"""kMaX-DeepLab on DeiT-S, COCO panoptic: AdamW 5e-4, batch 64, 150k iterations, 1281 pixels, as the authors."""

from mmengine.config import read_base
from mmengine.optim import PolyLR

from densezoo.backbones import create_model
from densezoo.heads import KMaXDeepLab
from densezoo.train import Preprocess, UniversalSegmentor

with read_base():
    from .._base_.coco_panoptic_50e import *

max_iters = 150000

model = dict(
    type=UniversalSegmentor,
    backbone=dict(
        type=create_model, name='deit_small_patch16_224', pretrained=True, features_only=True, drop_path_rate=0.1
    ),
    head=dict(type=KMaXDeepLab, num_classes=133, things=80, drop_path=0.2),
    # 1281 = 32 * 40 + 1: the corners of all maps lie on one another.
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
train_dataloader.update(batch_size=8)  # on each of 8 GPUs: 64
train_dataloader['dataset']['transforms'][1].update(size=(1281, 1281), scale=(0.2, 2.0))
val_dataloader['dataset']['transforms'][0].update(short=1281, long=1281)
optim_wrapper['optimizer'].update(lr=5e-4)
optim_wrapper.update(clip_grad=None)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=5000),
    dict(type=PolyLR, power=0.9, eta_min=0.0, by_epoch=False, begin=5000, end=max_iters),
]
train_cfg.update(max_iters=max_iters, val_interval=15000)

# published with R50: 53.3 PQ, with this backbone nothing; not trained here
