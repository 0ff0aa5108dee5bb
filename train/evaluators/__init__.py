"""Evaluators: mmengine metrics whose names are the keys of a run's metrics.json as they are (fractions and dB)."""

from .accuracy import Accuracy
from .base import Metric
from .boundary import BoundaryMetric
from .coco import CocoMetric
from .panoptic import PanopticMetric
from .restoration import RestorationMetric, psnr, ssim
from .segmentation import SegmentationMetric

__all__ = [
    'Accuracy',
    'BoundaryMetric',
    'CocoMetric',
    'Metric',
    'PanopticMetric',
    'RestorationMetric',
    'SegmentationMetric',
    'psnr',
    'ssim',
]
