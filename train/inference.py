"""A trained task on picture files, without a dataset: what tools/predict.py does.

predictor = Predictor(load_config('quickstart/detection'), 'work_dirs/detection/best.pth')
result, = predictor([predictor.read('photo.jpg')])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors

from ..backbones.reduction import token_maps
from ..data import build_transforms, collate, read_image
from .checkpoint import load_checkpoint
from .deployed import DeployedTask
from .runner import load_weights
from .tasks import Restorer, Task
from .visualize import as_pixels, save
from .visualize_tokens import draw_tokens


class Predictor:
    """A task with a checkpoint's weights, or what was exported of it, and the evaluation transforms of its config.

    Args:
        config: from `load_config`.
        checkpoint: best.pth or last.pth of a run, or what was exported of it.
        device: of a checkpoint; default: a GPU where there is one.

    Raises: ValueError where the checkpoint does not fit the config's model.
    """

    task: Task

    def __init__(self, config: Config, checkpoint: str | Path | DeployedTask, *, device: str | None = None) -> None:
        self.deployed = checkpoint if isinstance(checkpoint, DeployedTask) else None
        self.metainfo: Mapping[str, Any]
        if isinstance(checkpoint, DeployedTask):
            self.restores, self.metainfo = checkpoint.task == Restorer.__name__, checkpoint.metainfo
        else:
            loaded = load_checkpoint(checkpoint)
            self.task = MODELS.build(config.model)
            load_weights(self.task, loaded['state_dict'], str(checkpoint))
            self.task.to(device or ('cuda' if torch.cuda.is_available() else 'cpu')).eval()
            self.restores = isinstance(self.task, Restorer)
            self.metainfo = loaded.get('meta', {}).get('dataset_meta') or {}
        loader = config.get('test_dataloader') or config.get('val_dataloader') or {}
        self.transforms = build_transforms(loader.get('dataset', {}).get('transforms'))

    def read(self, file: str | Path) -> dict[str, Any]:
        """A picture file -> the sample that a dataset would make of it. Raises DataError."""
        image = read_image(file, deep_as_float=self.restores)
        original = (int(image.shape[-2]), int(image.shape[-1]))
        sample: dict[str, Any] = {'image': tv_tensors.Image(image)}
        for transform in self.transforms:
            sample = transform(sample)
        pixels = sample['image'].as_subclass(Tensor)
        if self.restores and not pixels.is_floating_point():
            pixels = pixels / 255.0
        size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
        target = {'file': str(file), 'image_id': 0, 'index': 0, 'size': size, 'original_size': original}
        return {'image': pixels, 'target': target}

    @torch.inference_mode()
    def __call__(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Samples of `read` -> results, one dict per picture, in the picture's own coordinates, on the CPU."""
        results = self.task.val_step(collate(samples)) if self.deployed is None else self.deployed(samples)
        return [{name: v.cpu() if isinstance(v, Tensor) else v for name, v in r.items()} for r in results]

    @torch.inference_mode()
    def draw_tokens(self, samples: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """Samples of `read` -> a picture each of what became of their patches in each block, see `visualize_tokens`.

        Raises:
            ValueError: a deployed model, or a backbone without reduction.
        """
        if self.deployed is not None:
            raise ValueError('tokens are shown of a checkpoint: what was exported keeps no track of them')
        backbone = self.task.backbone
        images = self.task.data_preprocessor(collate(samples), False)['images']
        maps = [each.cpu() for each in token_maps(backbone, images)]
        patch = images.shape[-1] // maps[0].shape[-1] if not hasattr(backbone, 'stride') else backbone.stride
        return [draw_tokens(sample['image'], [each[i] for each in maps], patch) for i, sample in enumerate(samples)]

    def describe(self, result: Mapping[str, Any], target: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
        """A result as plain values for a JSON; images in it are written into `folder` under `name`."""
        entry: dict[str, Any] = {'file': target['file'], 'size': list(target['original_size'])}
        if 'boxes' in result:
            entry |= {key: result[key].tolist() for key in ('boxes', 'labels', 'scores')}
            entry['names'] = [self.class_name(label) for label in entry['labels']]
            if 'masks' in result:
                entry['masks'] = [encode_mask(mask) for mask in result['masks']]
        elif 'mask' in result:
            mask = result['mask']
            save_ids(folder / f'{name}_mask.png', mask)
            labels, counts = mask.unique(return_counts=True)
            shares = zip(labels.tolist(), (counts / mask.numel()).tolist(), strict=True)
            entry |= {'mask': f'{name}_mask.png', 'classes': {self.class_name(label): share for label, share in shares}}
        elif 'image' in result:
            save(folder / f'{name}_restored.png', as_pixels(result['image']))
            entry['restored'] = f'{name}_restored.png'
        else:
            label = int(result['label'])
            entry |= {'label': label, 'name': self.class_name(label), 'score': float(result['scores'][label])}
            entry['scores'] = result['scores'].tolist()
        return entry

    def class_name(self, label: int) -> str:
        classes = self.metainfo.get('classes') or ()
        return str(classes[label]) if 0 <= label < len(classes) else str(label)


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """(H, W) bool -> COCO run-length encoding {'size': [H, W], 'counts': text}."""
    code = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {'size': [int(side) for side in code['size']], 'counts': code['counts'].decode()}


def save_ids(path: Path, mask: Tensor) -> None:
    """(H, W) class ids -> a grey PNG of 8 bits, or of 16 where there are more than 256 classes."""
    deep = int(mask.max()) > 255
    Image.fromarray(mask.numpy().astype(np.uint16 if deep else np.uint8)).save(path)
