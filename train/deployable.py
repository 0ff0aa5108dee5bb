"""A trained task as one module of images: what is exported, quantized and compiled.

Normalisation is inside, so that a program on a device feeds the pixels it has; outputs are plain tensors of fixed
number, named after what they hold.
"""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..heads.detection import CANDIDATES, best_equal
from ..kernels import suppress, suppress_by_products
from .tasks import Detector, ImageClassifier, Restorer, Segmentor, Task

FORMS = ('mask', 'logits')
# 'operator' is ONNX's NonMaxSuppression, 'products' the same in operations that TensorRT's compilers know
SUPPRESSIONS = {'operator': suppress, 'products': suppress_by_products}


class Deployable(nn.Module):
    """Images (B, 3, H, W), RGB, float in 0..255 (restoration: 0..1) -> tensors called `outputs`.

    classification: logits (B, K).
    segmentation: mask (B, H, W) int32 class ids, or with form='logits' logits (B, K, H, W).
    detection: boxes (B, M, 4) xyxy in pixels, scores (B, M), labels (B, M) int32: the M best candidates, before NMS;
    with `nms` the results (B, D, 4), (B, D), (B, D), best first, where rows that hold nothing have the score 0.
    instances: results, and masks (B, D, P, P): probabilities on a grid over each box.
    restoration: restored (B, 3, H, W) in 0..1.

    Args:
        task: with its weights.
        form: of segmentation's output.
        nms: of detection: None leaves suppression to who reads the candidates, 'operator' or 'products' put it into the
            graph. Masks belong to results: where the head makes them, None is 'products'.

    Raises:
        ValueError: form or nms is unknown, the task has no boxes for nms, or the head no form of fixed shape.
    """

    outputs: tuple[str, ...]
    mean: Tensor
    std: Tensor

    def __init__(self, task: Task, *, form: str = 'mask', nms: str | None = None):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f'form must be one of {", ".join(FORMS)}, got {form=}')
        if nms is not None and nms not in SUPPRESSIONS:
            raise ValueError(f'nms must be None or one of {", ".join(SUPPRESSIONS)}, got {nms=}')
        if nms is not None and not isinstance(task, Detector):
            raise ValueError(f'nms is for detection, {type(task).__name__} has no boxes')
        if isinstance(task, Detector) and not hasattr(task.head, 'decode'):
            raise ValueError(f'{type(task.head).__name__} has no decode() of fixed shape and does not export')
        self.backbone, self.neck, self.head = task.backbone, task.neck, task.head
        self.kind, self.form = type(task), form
        self.masks = isinstance(task, Detector) and getattr(task.head, 'masks', False)
        self.nms = 'products' if self.masks and nms is None else nms
        preprocess = task.data_preprocessor
        self.normalise = preprocess.normalise
        self.register_buffer('mean', preprocess.mean.clone(), persistent=False)
        self.register_buffer('std', preprocess.std.clone(), persistent=False)
        names: dict[type[Task], tuple[str, ...]] = {
            ImageClassifier: ('logits',),
            Segmentor: (form,),
            Detector: ('boxes', 'scores', 'labels', *(['masks'] if self.masks else [])),
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
            return self._detections(features)
        if issubclass(self.kind, Restorer):
            return (x + self.head(features, x)).clamp(0, 1)  # the head gives a residual
        out = self.head(features)
        if issubclass(self.kind, ImageClassifier):
            return out
        out = F.interpolate(out, size=images.shape[-2:], mode='bilinear', align_corners=False)
        return out if self.form == 'logits' else out.argmax(1).int()

    def _detections(self, features: Any) -> tuple[Tensor, ...]:
        head = self.head
        two_stages = 'suppress' in inspect.signature(head.decode).parameters
        inside = SUPPRESSIONS[self.nms or 'products']
        boxes, scores, labels = head.decode(features, inside) if two_stages else head.decode(features)
        if self.nms is None:
            return boxes, scores, labels.int()
        if self.nms == 'products' and scores.shape[1] > CANDIDATES:
            scores, index = scores.topk(CANDIDATES, 1)
            boxes, labels = boxes.gather(1, index[..., None].expand(-1, -1, 4)), labels.gather(1, index)
        boxes, scores, labels = best_equal(boxes, scores, labels, suppress=inside, **thresholds(head))
        masks = (head.decode_masks(features, boxes, labels),) if self.masks else ()
        return boxes, scores, labels.int(), *masks


def thresholds(head: Any) -> dict[str, Any]:
    """How a head's candidates become results, as `heads.detection` names it: nms, limit, score_threshold, min_size."""
    if hasattr(head, 'roi_heads'):
        inner = head.roi_heads
        return {
            'nms': inner.nms_thresh,
            'limit': inner.detections_per_img,
            'score_threshold': inner.score_thresh,
            'min_size': 1e-2,  # as torchvision's second stage
        }
    return {
        'nms': head.nms_threshold,
        'limit': head.detections,
        'score_threshold': head.score_threshold,
        'min_size': head.min_size,
    }


def metadata(task: Task, metainfo: Any = None, nms: str | None = None) -> dict[str, Any]:
    """What a reader of the exported file must know: task, classes, value range of the images, what is left to do.

    Args:
        task: the task.
        nms: of the exported form.
        metainfo: of the dataset (`classes`, `palette`), as checkpoints hold it.
    """
    scale = '0..255' if task.data_preprocessor.normalise else '0..1'
    kinds = (ImageClassifier, Segmentor, Detector, Restorer)
    kind = next((kind for kind in kinds if isinstance(task, kind)), type(task))  # one with a teacher is still its kind
    entries: dict[str, Any] = {'task': kind.__name__, 'channels': 'RGB', 'range': scale, 'normalised': 'inside'}
    classes = (metainfo or {}).get('classes')
    if classes:
        entries['classes'] = list(classes)
    entries['divisor'] = task.data_preprocessor.divisor
    if task.data_preprocessor.normalise:
        entries['padding'] = task.data_preprocessor.mean.flatten().tolist()  # what becomes 0 inside
    if isinstance(task, Detector):
        head = task.head
        entries['nms'] = nms or ('products' if getattr(head, 'masks', False) else 'outside')
        entries['decoding'] = thresholds(head)
        if getattr(head, 'masks', False):
            entries['mask_threshold'] = head.mask_threshold
    return entries
