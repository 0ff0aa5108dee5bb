"""The tasks: classification, segmentation, detection, universal segmentation, restoration."""

from .base import Task
from .kinds import Detector, ImageClassifier, Restorer, Segmentor, UniversalSegmentor

__all__ = ['Detector', 'ImageClassifier', 'Restorer', 'Segmentor', 'Task', 'UniversalSegmentor']
