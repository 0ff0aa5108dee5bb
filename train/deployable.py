"""A trained task as one module of images: what is exported, quantized and compiled.

Normalisation is inside, so that a program on a device feeds the pixels it has; outputs are plain tensors of fixed
number, named after what they hold.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .tasks import Detector, ImageClassifier, Restorer, Segmentor, Task

FORMS = ('mask', 'logits')


class Deployable(nn.Module):
    """Images (B, 3, H, W), RGB, float in 0..255 (restoration: 0..1) -> tensors called `outputs`.

    classification: logits (B, K).
    segmentation: mask (B, H, W) int32 class ids, or with form='logits' logits (B, K, H, W).
    detection: boxes (B, M, 4) xyxy in pixels, scores (B, M), labels (B, M) int32: the M best candidates, before NMS.
    restoration: restored (B, 3, H, W) in 0..1.

    Args:
        task: with its weights.
        form: of segmentation's output.

    Raises:
        ValueError: the form is unknown, or the head has no form of fixed shape.
    """

    outputs: tuple[str, ...]
    mean: Tensor
    std: Tensor

    def __init__(self, task: Task, *, form: str = 'mask'):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f'form must be one of {", ".join(FORMS)}, got {form=}')
        if isinstance(task, Detector) and not hasattr(task.head, 'decode'):
            raise ValueError(
                f'{type(task.head).__name__} chooses its second stage by the picture, which no graph of fixed shape '
                'holds; RetinaNet and FCOS export'
            )
        self.backbone, self.neck, self.head = task.backbone, task.neck, task.head
        self.kind, self.form = type(task), form
        preprocess = task.data_preprocessor
        self.normalise = preprocess.normalise
        self.register_buffer('mean', preprocess.mean.clone(), persistent=False)
        self.register_buffer('std', preprocess.std.clone(), persistent=False)
        names: dict[type[Task], tuple[str, ...]] = {
            ImageClassifier: ('logits',),
            Segmentor: (form,),
            Detector: ('boxes', 'scores', 'labels'),
            Restorer: ('restored',),
        }
        self.outputs = next(outputs for kind, outputs in names.items() if isinstance(task, kind))

    @property
    def sizes(self) -> Any:
        return self.backbone.sizes

    @property
    def min_dynamic_size(self) -> int:
        return self.backbone.min_dynamic_size

    def forward(self, images: Tensor) -> Any:
        x = (images - self.mean) / self.std if self.normalise else images
        features = self.backbone(x)
        if self.neck is not None:
            features = self.neck(features)
        if issubclass(self.kind, Detector):
            boxes, scores, labels = self.head.decode(features)
            return boxes, scores, labels.int()
        if issubclass(self.kind, Restorer):
            return (x + self.head(features, x)).clamp(0, 1)  # the head gives a residual
        out = self.head(features)
        if issubclass(self.kind, ImageClassifier):
            return out
        out = F.interpolate(out, size=images.shape[-2:], mode='bilinear', align_corners=False)
        return out if self.form == 'logits' else out.argmax(1).int()


def metadata(task: Task, metainfo: Any = None) -> dict[str, Any]:
    """What a reader of the exported file must know: task, classes, value range of the images.

    Args:
        task: the task.
        metainfo: of the dataset (`classes`, `palette`), as checkpoints hold it.
    """
    scale = '0..255' if task.data_preprocessor.normalise else '0..1'
    entries: dict[str, Any] = {'task': type(task).__name__, 'channels': 'RGB', 'range': scale, 'normalised': 'inside'}
    classes = (metainfo or {}).get('classes')
    if classes:
        entries['classes'] = list(classes)
    return entries
