"""The tasks: classification, segmentation, detection, universal segmentation, restoration."""

from .base import Task
from .distillation import DistilledClassifier, DistilledDetector, DistilledRestorer, DistilledSegmentor
from .kinds import Detector, ImageClassifier, Restorer, Segmentor, UniversalSegmentor
from .reduction import ReducedClassifier

__all__ = [
    'Detector',
    'DistilledClassifier',
    'DistilledDetector',
    'DistilledRestorer',
    'DistilledSegmentor',
    'ImageClassifier',
    'ReducedClassifier',
    'Restorer',
    'Segmentor',
    'Task',
    'UniversalSegmentor',
]
