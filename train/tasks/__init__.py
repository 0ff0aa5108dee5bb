"""The tasks: classification, segmentation, detection, restoration."""

from .base import Task
from .distillation import DistilledClassifier, DistilledDetector, DistilledRestorer, DistilledSegmentor
from .kinds import Detector, ImageClassifier, Restorer, Segmentor

__all__ = [
    'Detector',
    'DistilledClassifier',
    'DistilledDetector',
    'DistilledRestorer',
    'DistilledSegmentor',
    'ImageClassifier',
    'Restorer',
    'Segmentor',
    'Task',
]
