"""An exported file in the place of a trained task: the same samples in, the same results out.

file = DeployedTask(OnnxModel('detection_fp32.onnx'))
results = file([predictor.read('photo.jpg')])
metrics = evaluate(load_config('quickstart/detection'), file)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

from ..data import collate
from ..heads.detection import finish, rescale
from ..heads.universal import Reader

Results = list[dict[str, Any]]
Shape = tuple[int | None, ...]


class Exported(Protocol):
    """What `deploy.OnnxModel` and `deploy.Engine` have: this folder does not know them."""

    path: Path
    metadata: dict[str, Any]
    device: str

    @property
    def shapes(self) -> tuple[Shape, Shape]: ...

    def __call__(self, *tensors: Tensor) -> Any: ...


class DeployedTask:
    """An ONNX file on onnxruntime or a TensorRT engine, called with the samples of a dataset.

    Pictures are brought to what the file takes: padded right and bottom as the task pads them, scaled down where they
    are larger than it takes (not for restoration). Results are in the picture's own coordinates.

    Args:
        model: of a file that `densezoo export CONFIG CHECKPOINT` wrote.

    Raises:
        ValueError: the file holds no task (a backbone alone).
    """

    def __init__(self, model: Exported):
        self.model, self.metadata, self.name = model, model.metadata, model.path.name
        if 'task' not in self.metadata:
            raise ValueError(f'{self.name} holds no task; `densezoo export CONFIG CHECKPOINT` writes one')
        self.task = str(self.metadata['task'])
        self.smallest, self.largest = model.shapes

    @property
    def holes(self) -> bool:
        """Whether images have a mask of what is known as their last channel."""
        return bool(self.metadata.get('holes'))

    @property
    def least_tile(self) -> int:
        """The smallest side of a picture that is not padded."""
        return max(side or 1 for side in self.smallest[2:])

    @property
    def metainfo(self) -> dict[str, Any]:
        """Of the dataset, as checkpoints have it."""
        return {'classes': tuple(self.metadata.get('classes') or ())}

    @torch.inference_mode()
    def __call__(self, samples: Sequence[dict[str, Any]]) -> Results:
        """Samples of a dataset or of `Predictor.read` -> results, one dict per picture, as the task's `predict`."""
        fitted = [self._fit(sample['image']) for sample in samples]
        results: Results = []
        for group in self._groups([image for image, _ in fitted]):
            first = len(results)
            outputs = self._run(group)
            for i in range(len(group)):
                target, size = samples[first + i]['target'], fitted[first + i][1]
                results.append(self._result([x[i : i + 1] for x in outputs], target, size))
        return results

    def _fit(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """An image (3, h, w) as the file takes it, and which part of that is the picture."""
        pixels = image.as_subclass(Tensor).float()
        if self.task == 'Restorer' and not image.is_floating_point():
            pixels = pixels / 255
        height, width = pixels.shape[-2:]
        most = self.largest[2] or height, self.largest[3] or width
        if self.task == 'ImageClassifier' and self.largest[2] == self.smallest[2] and (height, width) != most:
            pixels = _resize(pixels, most)
        elif height > most[0] or width > most[1]:
            if self.task == 'Restorer':
                raise ValueError(
                    f'{self.name} takes pictures of at most {most[0]}x{most[1]}, got {height}x{width}; '
                    'export with a larger --size, or with --dynamic-size'
                )
            scale = min(most[0] / height, most[1] / width)
            pixels = _resize(pixels, (max(int(height * scale), 1), max(int(width * scale), 1)))
        height, width = pixels.shape[-2:]
        step = int(self.metadata.get('divisor', 1))
        full = []
        for side, least, limit in zip((height, width), self.smallest[2:], self.largest[2:]):
            wanted = -(-max(side, least or 1) // step) * step
            full.append(wanted if limit is None else min(wanted, limit))
        if full != [height, width]:
            padding = self.metadata.get('padding', [0.0] * len(pixels))
            padded = torch.tensor(padding).view(-1, 1, 1).repeat(1, *full)
            padded[:, :height, :width] = pixels
            pixels = padded
        return pixels, (height, width)

    def _groups(self, images: Sequence[Tensor]) -> list[list[Tensor]]:
        """Neighbours of one size, at most as many as the file takes at once."""
        groups: list[list[Tensor]] = []
        for image in images:
            if groups and groups[-1][0].shape == image.shape and len(groups[-1]) < (self.largest[0] or len(images)):
                groups[-1].append(image)
            else:
                groups.append([image])
        return groups

    def _run(self, images: Sequence[Tensor]) -> list[Tensor]:
        batch = torch.stack(list(images))
        missing = (self.smallest[0] or 1) - len(batch)
        if missing > 0:  # a file of one batch size
            batch = torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)])
        outputs = self.model(batch.to(self.model.device))
        return [x.cpu()[: len(images)] for x in (outputs if isinstance(outputs, list) else [outputs])]

    def _result(self, outputs: list[Tensor], target: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        original = tuple(target['original_size'])
        if self.task == 'ImageClassifier':
            scores = outputs[0][0].softmax(0)
            return {'scores': scores, 'label': int(scores.argmax())}
        if self.task == 'Restorer':
            scale = int(self.metadata.get('scale', 1))
            return {'image': outputs[0][0, :, : size[0] * scale, : size[1] * scale]}
        if self.task == 'Segmentor':
            return {'mask': _mask(outputs[0][..., : size[0], : size[1]], original)}
        if self.task == 'UniversalSegmentor':
            reader = Reader(**self.metadata['decoding'])
            return reader.results(outputs[0], outputs[1], [size], [(original[0], original[1])])[0]
        boxes, scores, labels = (x[0] for x in outputs[:3])
        decoding = self.metadata['decoding']
        if self.metadata['nms'] == 'outside':
            real = scores > decoding['score_threshold']
            return finish(boxes[real], scores[real], labels[real].long(), size, original,
                          nms=decoding['nms'], limit=decoding['limit'], min_size=decoding['min_size'])  # fmt: skip
        real = scores > 0
        if self.metadata['nms'] == 'none':  # the head's own results: nothing lies beyond the picture, nothing is empty
            boxes = clip_boxes_to_image(boxes, size)
            real &= ((boxes[:, 2:] - boxes[:, :2]) > decoding['min_size']).all(1)
        result = {'boxes': rescale(boxes[real], size, original), 'scores': scores[real], 'labels': labels[real].long()}
        if len(outputs) > 3:
            pasted = paste_masks_in_image(outputs[3][0][real][:, None], result['boxes'], original)[:, 0]
            threshold = self.metadata['mask_threshold']
            result['masks'] = pasted if threshold is None else pasted >= threshold
        return result


def evaluate(config: Config, predict: Callable[[Sequence[dict[str, Any]]], Results]) -> dict[str, float]:
    """Metrics on a config's test data (validation data where there is none), by the config's evaluators.

    Args:
        config: from `load_config`.
        predict: samples of the dataset -> results, such as a `DeployedTask` or a `Predictor`.
    """
    loader = config.get('test_dataloader') or config.val_dataloader
    evaluators = config.get('test_evaluator') or config.val_evaluator
    dataset = DATASETS.build(loader.dataset)
    evaluator = Evaluator(evaluators)
    evaluator.dataset_meta = dataset.metainfo
    step = int(loader.get('batch_size', 1))
    for start in range(0, len(dataset), step):
        samples = [dataset[i] for i in range(start, min(start + step, len(dataset)))]
        evaluator.process(data_samples=predict(samples), data_batch=collate(samples))
    return {name: float(value) for name, value in evaluator.evaluate(len(dataset)).items()}


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels[None], size=size, mode='bilinear', align_corners=False, antialias=True)[0]


def _mask(output: Tensor, original: tuple[int, ...]) -> Tensor:
    """Class ids (1, h, w) or logits (1, K, h, w) -> class ids of the picture's own size."""
    if output.ndim == 4:
        return F.interpolate(output, size=original, mode='bilinear', align_corners=False)[0].argmax(0)
    if tuple(output.shape[1:]) == original:
        return output[0].long()
    return F.interpolate(output[None].float(), size=original, mode='nearest-exact')[0, 0].long()
