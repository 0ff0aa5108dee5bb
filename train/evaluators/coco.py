"""COCO's mean average precision for boxes and masks, computed by pycocotools itself."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as run_length
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .base import Metric

# name -> index in COCOeval.stats
_STATS = {'mAP': 0, 'mAP_50': 1, 'mAP_75': 2, 'mAP_s': 3, 'mAP_m': 4, 'mAP_l': 5, 'AR_100': 8}


class CocoMetric(Metric):
    """'coco/bbox_mAP', 'coco/bbox_mAP_50', '_75', '_s', '_m', '_l' and 'coco/bbox_AR_100' (0..1); also 'coco/segm_...'.

    The ground truth is the dataset's own annotation file, so crowd regions and areas count as COCO says. -1 is COCO's
    word for "no object of this size in the ground truth". Only images that were processed are evaluated.

    Results need `boxes` (N, 4) xyxy in pixels of the original picture, `scores` (N,), `labels` (N,) in 0..K-1, and for
    'segm' `masks` (N, H, W) bool at the original size. `dataset_meta` needs `ann_file` and `category_ids`, in the order
    of the labels; None stands for a class that the file does not hold (stuff of a panoptic dataset).

    Args:
        iou_types: 'bbox', 'segm' or both.
        classwise: also report 'coco/bbox_AP_<class name>'.
    """

    def __init__(self, *, iou_types: Sequence[str] = ('bbox',), classwise: bool = False) -> None:
        super().__init__()
        types = (iou_types,) if isinstance(iou_types, str) else tuple(iou_types)
        if not types or set(types) - {'bbox', 'segm'}:
            raise ValueError(f"iou_types must be of 'bbox', 'segm', got {iou_types=}")
        self.iou_types = types
        self.classwise = classwise
        self._truth: tuple[str, COCO] | None = None

    def measure(self, image: Any, target: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """The image's id and its detections, masks as run lengths."""
        boxes = torch.as_tensor(result['boxes']).detach().float().cpu().reshape(-1, 4)
        measurement = {
            'image_id': int(target['image_id']),
            'bbox': torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).numpy(),
            'scores': torch.as_tensor(result['scores']).detach().float().cpu().numpy(),
            'labels': torch.as_tensor(result['labels']).detach().cpu().numpy(),
        }
        if 'segm' in self.iou_types:
            if 'masks' not in result:
                raise ValueError("iou_types asks for 'segm' but the results hold no masks: use a head with masks")
            masks = torch.as_tensor(result['masks']).detach().cpu().numpy().astype(np.uint8)
            if len(masks) and masks.shape[1:] != tuple(target['original_size']):
                raise ValueError(
                    f'{target.get("file", "image")}: masks have size {masks.shape[1:]}, '
                    f'the picture {tuple(target["original_size"])}'
                )
            measurement['segm'] = [run_length.encode(np.asfortranarray(mask)) for mask in masks]
        return measurement

    def summarise(self, measurements: list[dict[str, Any]]) -> dict[str, float]:
        """Run COCOeval once per iou type."""
        truth, category_ids = self._load()
        image_ids = [measurement['image_id'] for measurement in measurements]
        if unknown := set(image_ids) - set(truth.imgs):
            raise ValueError(f'image_id {min(unknown)} is not in {self._meta("ann_file")} ({len(unknown)} such ids)')
        metrics = {}
        for kind in self.iou_types:
            key = 'bbox' if kind == 'bbox' else 'segmentation'
            for label in {int(label) for measurement in measurements for label in measurement['labels']}:
                if category_ids[label] is None:
                    raise ValueError(
                        f'label {label} of a detected object is stuff, which {self._meta("ann_file")} lacks'
                    )
            detections = [
                {
                    'image_id': measurement['image_id'],
                    'category_id': category_ids[int(label)],
                    'score': float(score),
                    key: found.tolist() if kind == 'bbox' else found,
                }
                for measurement in measurements
                for label, score, found in zip(
                    measurement['labels'], measurement['scores'], measurement[kind], strict=True
                )
            ]
            evaluation = self._evaluate(
                truth, detections, kind, image_ids, [number for number in category_ids if number is not None]
            )
            for name, position in _STATS.items():
                metrics[f'coco/{kind}_{name}'] = float(evaluation.stats[position])
            if self.classwise:
                for position, category in enumerate(evaluation.params.catIds):
                    precision = evaluation.eval['precision'][:, :, position, 0, -1]
                    value = precision[precision > -1].mean() if (precision > -1).any() else -1.0
                    metrics[f'coco/{kind}_AP_{truth.cats[category]["name"]}'] = float(value)
        return metrics

    @staticmethod
    def _evaluate(
        truth: COCO, detections: list[dict], kind: str, image_ids: list[int], category_ids: list[int]
    ) -> COCOeval:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each step
            if detections:
                found = truth.loadRes(detections)
            else:  # loadRes([]) is an IndexError
                found = COCO()
                found.dataset = {**truth.dataset, 'annotations': []}
                found.createIndex()
            evaluation = COCOeval(truth, found, kind)
            evaluation.params.imgIds = image_ids
            evaluation.params.catIds = category_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _load(self) -> tuple[COCO, list[int | None]]:
        file = str(self._meta('ann_file'))
        if self._truth is None or self._truth[0] != file:
            with contextlib.redirect_stdout(io.StringIO()):
                self._truth = file, COCO(file)
        return self._truth[1], [None if number is None else int(number) for number in self._meta('category_ids')]

    def _meta(self, key: str) -> Any:
        if not self.dataset_meta or key not in self.dataset_meta:
            raise ValueError(
                f"CocoMetric needs dataset_meta['{key}'], which CocoDetection gives; "
                f'got {sorted(self.dataset_meta or {})}'
            )
        return self.dataset_meta[key]
