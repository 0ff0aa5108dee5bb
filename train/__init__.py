"""Training with mmengine: tasks, preprocessing, optimizer groups, loops, hooks, configs, the runner.

from densezoo.train import Detector, ImageClassifier, Restorer, Segmentor, UniversalSegmentor   # a config's model types
from densezoo.train import build_runner, load_config

build_runner(load_config("quickstart/detection"), work_dir="work_dirs/try").train()
"""

from .config import find_config, load_config
from .loops import EpochLoop, IterLoop
from .optim import LayerDecayConstructor, OptimWrapper
from .preprocess import Preprocess
from .runner import Runner, build_runner
from .tasks import (
    Detector,
    DistilledClassifier,
    DistilledDetector,
    DistilledRestorer,
    DistilledSegmentor,
    ImageClassifier,
    ReducedClassifier,
    Restorer,
    Segmentor,
    Task,
    UniversalSegmentor,
)

__all__ = [
    'Detector',
    'DistilledClassifier',
    'DistilledDetector',
    'DistilledRestorer',
    'DistilledSegmentor',
    'EpochLoop',
    'ImageClassifier',
    'IterLoop',
    'LayerDecayConstructor',
    'OptimWrapper',
    'Preprocess',
    'ReducedClassifier',
    'Restorer',
    'Runner',
    'Segmentor',
    'Task',
    'UniversalSegmentor',
    'build_runner',
    'find_config',
    'load_config',
]
