"""The tasks: classification, segmentation, detection, universal segmentation, restoration."""

from .base import Task
from .distillation import DistilledClassifier, DistilledDetector, DistilledRestorer, DistilledSegmentor
from .kinds import Detector, ImageClassifier, Restorer, Segmentor, UniversalSegmentor

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
    'UniversalSegmentor',
]
