"""COCO 2017 for 12 epochs ("1x"): 800 x 1333, batch 16, AdamW, steps at epochs 8 and 11; under coco/."""

from mmengine.optim import LinearLR, MultiStepLR
from mmengine.runner import ValLoop
from torch.optim import AdamW
from torchvision.transforms import v2

from densezoo.data import CocoDetection, ResizeRange
from densezoo.train import EpochLoop, OptimWrapper
from densezoo.train.evaluators import CocoMetric

root = '$DENSEZOO_DATA/coco'

train_dataloader = dict(
    batch_size=2,  # on each of 8 GPUs: 16
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    dataset=dict(
        type=CocoDetection,
        root=root,
        split='train',
        transforms=[dict(type=ResizeRange, short=800, long=1333), dict(type=v2.RandomHorizontalFlip)],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type=CocoDetection, root=root, split='val', transforms=[dict(type=ResizeRange, short=800, long=1333)]),
)
val_evaluator = dict(type=CocoMetric, iou_types=('bbox',))

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=1e-4),
    constructor='LayerDecayConstructor',
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type=MultiStepLR, by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(type=EpochLoop, max_epochs=12, val_interval=1)
val_cfg = dict(type=ValLoop)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))
