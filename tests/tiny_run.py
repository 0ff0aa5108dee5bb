"""A training small enough for a test: 48 pictures of 32x32 in 4 classes, a PoolFormer of four narrow blocks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ('cyan', 'green', 'magenta', 'red')
CONFIG = """
from mmengine.optim import LinearLR
from mmengine.runner import ValLoop
from torch.optim import AdamW
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import EvalSampler, ImageFolder, RestartableSampler, collate
from densezoo.heads import LinearClassifier
from densezoo.train import ImageClassifier, IterLoop, OptimWrapper, Preprocess
from densezoo.train.evaluators import Accuracy

model = dict(
    type=ImageClassifier,
    backbone=dict(
        type=create_model,
        name='poolformer_s12',
        features_only=True,
        out_indices=(3,),
        depths=(1, 1, 1, 1),
        dims=(8, 16, 24, 32),
        drop_path_rate=0.3,
    ),
    head=dict(type=LinearClassifier, num_classes=4, dropout=0.2),
    preprocess=dict(type=Preprocess, mean=(120.0, 120.0, 120.0), std=(60.0, 60.0, 60.0)),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=ImageFolder,
        root='ROOT',
        split='train',
        transforms=[dict(type=v2.RandomHorizontalFlip), dict(type=v2.ColorJitter, brightness=0.3)],
    ),
    sampler=dict(type=RestartableSampler),
    collate_fn=dict(type=collate),
)
val_dataloader = dict(
    batch_size=5,
    num_workers=0,
    dataset=dict(type=ImageFolder, root='ROOT', split='val'),
    sampler=dict(type=EvalSampler),
    collate_fn=dict(type=collate),
)
val_evaluator = dict(type=Accuracy, topk=(1, 2))
train_cfg = dict(type=IterLoop, max_iters=6, val_interval=3)
val_cfg = dict(type=ValLoop)
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=5e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(layer_decay=0.9),
)
param_scheduler = [dict(type=LinearLR, start_factor=0.1, by_epoch=False, begin=0, end=4)]
default_hooks = dict(log=dict(interval=1), checkpoint=dict(interval=2), summary=dict(curves=False))
visualizer = dict(type='Visualizer', vis_backends=[])
"""


def write_pictures(root: Path, train: int = 10, val: int = 3) -> Path:
    """Pictures in one colour per class, with noise: `root/{train,val}/<class>/<n>.png`."""
    rng = np.random.default_rng(0)
    colours = {'cyan': (0, 160, 160), 'green': (0, 200, 0), 'magenta': (170, 0, 170), 'red': (200, 0, 0)}
    for split, count in (('train', train), ('val', val)):
        for name, colour in colours.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(20, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f'{number}.png')
    return root


def write_config(folder: Path, root: Path, name: str = 'tiny.py') -> Path:
    """The config above for the pictures under `root`."""
    path = folder / name
    path.write_text(CONFIG.replace('ROOT', str(root)))
    return path


def read_losses(work_dir: Path) -> dict[int, float]:
    """Iteration -> loss, as logged; what was logged twice must have been equal."""
    losses: dict[int, float] = {}
    for line in (work_dir / 'log.jsonl').read_text().splitlines():
        row = json.loads(line)
        if row['kind'] == 'train':
            assert losses.setdefault(row['step'], row['loss']) == row['loss']
    return losses


def read_metrics(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / 'metrics.json').read_text())
