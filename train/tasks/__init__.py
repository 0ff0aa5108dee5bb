"""The tasks: classification, segmentation, detection, restoration."""

from .base import Task
from .kinds import Detector, ImageClassifier, Restorer, Segmentor

__all__ = ['Detector', 'ImageClassifier', 'Restorer', 'Segmentor', 'Task']
