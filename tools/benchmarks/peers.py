"""The quickstarts' metrics beside the same head on torchvision's smallest backbone, same recipe, same iterations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small
from torchvision.models.feature_extraction import create_feature_extractor

from densezoo.heads import PyramidInfo
from densezoo.train import build_runner, load_config

METRICS = {
    'classification': 'accuracy/top1',
    'detection': 'coco/bbox_mAP_50',
    'instance': 'coco/segm_mAP_50',
    'segmentation': 'mIoU',
    'restoration': 'psnr',
}


class MobileNetPyramid(nn.Module):
    """torchvision's mobilenet_v3_small, from scratch, as a pyramid: strides 4, 8, 16, 32; widths 16, 24, 48, 576."""

    nodes = {'features.1': (16, 4), 'features.3': (24, 8), 'features.8': (48, 16), 'features.12': (576, 32)}

    def __init__(self, *, out_indices: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        chosen = [list(self.nodes)[index] for index in out_indices]
        self.body = create_feature_extractor(mobilenet_v3_small(weights=None), chosen)
        self.feature_info = PyramidInfo(*zip(*(self.nodes[name] for name in chosen)))

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x).values())


class MobileNetClassifier(nn.Module):
    """torchvision's mobilenet_v3_small as a classifier."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.body = mobilenet_v3_small(weights=None, num_classes=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def run(tasks: Sequence[str] = tuple(METRICS), *, work_dir: str, max_iters: int | None = None) -> list[dict[str, Any]]:
    """Train each quickstart twice: rows of task, metric, ours, peer, and both runs' seconds."""
    rows = []
    for task in tasks:
        values: dict[str, Any] = {'task': task, 'metric': METRICS[task], 'peer_name': 'torchvision mobilenet_v3_small'}
        for side in ('ours', 'peer'):
            overrides = []
            if max_iters:
                warmup = min(100, max_iters // 2)
                overrides = [
                    f'train_cfg.max_iters={max_iters}',
                    f'param_scheduler.0.end={warmup}',
                    f'param_scheduler.1.begin={warmup}',
                    f'param_scheduler.1.end={max_iters}',
                ]
            config = load_config(f'quickstart/{task}', overrides)
            if side == 'peer':
                backbone = config.model.backbone
                if task == 'classification':
                    config.model.backbone = dict(type=MobileNetClassifier, num_classes=backbone.num_classes)
                else:
                    levels = backbone.get('out_indices', (0, 1, 2, 3))
                    config.model.backbone = dict(type=MobileNetPyramid, out_indices=tuple(levels))
            folder = Path(work_dir) / f'{task}_{side}'
            build_runner(config, work_dir=folder).train()
            metrics = json.loads((folder / 'metrics.json').read_text())
            values[side], values[f'{side}_seconds'] = metrics[METRICS[task]], metrics['seconds']
        rows.append(values)
    return rows
