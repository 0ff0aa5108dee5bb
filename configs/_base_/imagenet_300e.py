"""ImageNet-1k for 300 epochs: DeiT's augmentation, AdamW, cosine decay; an ImageFolder under imagenet/{train,val}.

Differs from timm's training script: RandAugment is torchvision's (two operations of magnitude 9, without timm's noise
on the magnitude), and erased rectangles are grey rather than noise.
"""

from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.runner import ValLoop
from torch.optim import AdamW
from torchvision.transforms import v2

from densezoo.data import ImageFolder, collate
from densezoo.train import EpochLoop, OptimWrapper
from densezoo.train.evaluators import Accuracy

root = '$DENSEZOO_DATA/imagenet'
epochs = 300
warmup_epochs = 5

train_dataloader = dict(
    batch_size=128,  # on each of 8 GPUs: 1024
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    dataset=dict(
        type=ImageFolder,
        root=root,
        split='train',
        transforms=[
            dict(type=v2.RandomResizedCrop, size=(224, 224), interpolation='bicubic'),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandAugment, num_ops=2, magnitude=9, interpolation='bicubic'),
            dict(type=v2.RandomErasing, p=0.25, value=(124, 116, 104)),
        ],
    ),
    collate_fn=dict(
        type=collate,
        mix=[
            dict(type=v2.MixUp, alpha=0.8, num_classes=1000),
            dict(type=v2.CutMix, alpha=1.0, num_classes=1000),
        ],
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    dataset=dict(
        type=ImageFolder,
        root=root,
        split='val',
        transforms=[
            dict(type=v2.Resize, size=248, interpolation='bicubic'),  # 224 / 0.9
            dict(type=v2.CenterCrop, size=224),
        ],
    ),
)
val_evaluator = dict(type=Accuracy, topk=(1, 5))

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.05),
    constructor='LayerDecayConstructor',
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=True, begin=0, end=warmup_epochs, convert_to_iter_based=True),
    dict(
        type=CosineAnnealingLR,
        eta_min=1e-5,
        by_epoch=True,
        begin=warmup_epochs,
        end=epochs,
        T_max=epochs - warmup_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=EpochLoop, max_epochs=epochs, val_interval=5)
val_cfg = dict(type=ValLoop)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))
