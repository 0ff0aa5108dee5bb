"""COCO 2017 panoptic for 50 epochs (368 750 iterations of batch 16): large-scale jitter to 1024 x 1024, AdamW, steps at
9/10 and 26/27 of the run, the backbone at a tenth of the rate; Mask2Former's recipe. Under coco/."""

from mmengine.optim import LinearLR, MultiStepLR
from mmengine.runner import ValLoop
from torch.optim import AdamW
from torchvision.transforms import v2

from densezoo.data import CocoPanoptic, LargeScaleJitter, ResizeRange
from densezoo.train import IterLoop, OptimWrapper
from densezoo.train.evaluators import CocoMetric, PanopticMetric, SegmentationMetric

root = '$DENSEZOO_DATA/coco'
max_iters = 368750

train_dataloader = dict(
    batch_size=2,  # on each of 8 GPUs: 16
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    dataset=dict(
        type=CocoPanoptic,
        root=root,
        split='train',
        transforms=[
            dict(type=v2.RandomHorizontalFlip),
            dict(type=LargeScaleJitter, size=(1024, 1024), scale=(0.1, 2.0), fill=(124, 116, 104)),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    dataset=dict(type=CocoPanoptic, root=root, split='val', transforms=[dict(type=ResizeRange, short=800, long=1333)]),
)
val_evaluator = [
    dict(type=PanopticMetric),
    dict(type=SegmentationMetric),
    dict(type=CocoMetric, iou_types=('segm',)),
]

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-4, weight_decay=0.05),
    constructor='LayerDecayConstructor',
    # A tenth at the backbone's last layer, and no less before it.
    paramwise_cfg=dict(layer_decay=0.1, min_scale=0.1),
    clip_grad=dict(max_norm=0.01),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=10),
    dict(type=MultiStepLR, by_epoch=False, begin=0, end=max_iters, milestones=[327778, 355092], gamma=0.1),
]
train_cfg = dict(type=IterLoop, max_iters=max_iters, val_interval=36875)
val_cfg = dict(type=ValLoop)

# In the order of the category ids, as CocoPanoptic numbers them: 80 things, then 53 stuff classes.
coco_classes = (
    'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck', 'boat', 'traffic light',
    'fire hydrant', 'stop sign', 'parking meter', 'bench', 'bird', 'cat', 'dog', 'horse', 'sheep', 'cow',
    'elephant', 'bear', 'zebra', 'giraffe', 'backpack', 'umbrella', 'handbag', 'tie', 'suitcase', 'frisbee',
    'skis', 'snowboard', 'sports ball', 'kite', 'baseball bat', 'baseball glove', 'skateboard', 'surfboard',
    'tennis racket', 'bottle', 'wine glass', 'cup', 'fork', 'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich',
    'orange', 'broccoli', 'carrot', 'hot dog', 'pizza', 'donut', 'cake', 'chair', 'couch', 'potted plant', 'bed',
    'dining table', 'toilet', 'tv', 'laptop', 'mouse', 'remote', 'keyboard', 'cell phone', 'microwave', 'oven',
    'toaster', 'sink', 'refrigerator', 'book', 'clock', 'vase', 'scissors', 'teddy bear', 'hair drier', 'toothbrush',
    'banner', 'blanket', 'bridge', 'cardboard', 'counter', 'curtain', 'door-stuff', 'floor-wood', 'flower', 'fruit',
    'gravel', 'house', 'light', 'mirror-stuff', 'net', 'pillow', 'platform', 'playingfield', 'railroad', 'river',
    'road', 'roof', 'sand', 'sea', 'shelf', 'snow', 'stairs', 'tent', 'towel', 'wall-brick', 'wall-stone',
    'wall-tile', 'wall-wood', 'water-other', 'window-blind', 'window-other', 'tree-merged', 'fence-merged',
    'ceiling-merged', 'sky-other-merged', 'cabinet-merged', 'table-merged', 'floor-other-merged', 'pavement-merged',
    'mountain-merged', 'grass-merged', 'dirt-merged', 'paper-merged', 'food-other-merged', 'building-other-merged',
    'rock-merged', 'wall-other-merged', 'rug-merged',
)  # fmt: skip
