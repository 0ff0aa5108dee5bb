"""Hooks of a run. `Runner` registers one of each by default (see densezoo.train.runner.DEFAULT_HOOKS)."""

from .checkpoint import Checkpoint
from .guard import NanGuard, NonFiniteError
from .log import Log
from .pictures import Pictures
from .progress import ProgressBar
from .reseed import Reseed
from .summary import Summary

__all__ = ['Checkpoint', 'Log', 'NanGuard', 'NonFiniteError', 'Pictures', 'ProgressBar', 'Reseed', 'Summary']
