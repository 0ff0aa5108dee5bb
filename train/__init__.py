"""Training with mmengine: tasks, preprocessing, optimizer groups, loops, hooks, configs, the runner.

from densezoo.train import Detector, ImageClassifier, Restorer, Segmentor      # model types of a config
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
    Restorer,
    Segmentor,
    Task,
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
    'Restorer',
    'Runner',
    'Segmentor',
    'Task',
    'build_runner',
    'find_config',
    'load_config',
]
