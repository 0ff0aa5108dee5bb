"""ADE20K for 40k iterations of batch 32 (as much as 80k of batch 16): 512 x 512 crops, AdamW, poly decay."""

from mmengine.optim import PolyLR
from mmengine.runner import ValLoop
from torch.optim import AdamW
from torchvision.transforms import v2

from densezoo.data import ADE20K, CropWithoutOneClassDominating, ResizeImageOnly, ResizeRange
from densezoo.train import IterLoop, OptimWrapper
from densezoo.train.evaluators import SegmentationMetric

root = '$DENSEZOO_DATA/ADEChallengeData2016'
max_iters = 40000

train_dataloader = dict(
    batch_size=4,  # on each of 8 GPUs: 32
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    dataset=dict(
        type=ADE20K,
        root=root,
        split='train',
        transforms=[
            dict(type=ResizeRange, short=512, long=2048, ratio=(0.5, 2.0)),
            dict(type=CropWithoutOneClassDominating, size=(512, 512), cat_max_ratio=0.75),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandomPhotometricDistort),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type=ADE20K, root=root, split='val', transforms=[dict(type=ResizeImageOnly, short=512, long=2048)]),
)
val_evaluator = dict(type=SegmentationMetric)

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=2e-4, weight_decay=1e-4),
    constructor='LayerDecayConstructor',
)
param_scheduler = [dict(type=PolyLR, power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=max_iters)]
train_cfg = dict(type=IterLoop, max_iters=max_iters, val_interval=4000)
val_cfg = dict(type=ValLoop)
