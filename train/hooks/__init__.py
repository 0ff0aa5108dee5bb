"""Hooks of a run. `DEFAULT_HOOKS` are in every run; a config changes one by name, or turns it off with None."""

from mmengine.hooks import Hook, ParamSchedulerHook

from .binary import BinarySchedule, RelearnCodes
from .checkpoint import Checkpoint
from .guard import NanGuard, NonFiniteError
from .log import Log
from .norm_schedule import NormSchedule
from .pictures import Pictures
from .progress import ProgressBar
from .reseed import Reseed
from .summary import Summary

DEFAULT_HOOKS: dict[str, type[Hook]] = {
    'param_scheduler': ParamSchedulerHook,
    'reseed': Reseed,
    'norm_schedule': NormSchedule,
    'guard': NanGuard,
    'log': Log,
    'checkpoint': Checkpoint,
    'progress': ProgressBar,
    'pictures': Pictures,
    'summary': Summary,
}

__all__ = [
    'DEFAULT_HOOKS',
    'BinarySchedule',
    'Checkpoint',
    'Log',
    'NanGuard',
    'NonFiniteError',
    'NormSchedule',
    'Pictures',
    'ProgressBar',
    'RelearnCodes',
    'Reseed',
    'Summary',
]
