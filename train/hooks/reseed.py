"""The same random numbers at iteration n, whatever happened before it."""

import random
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A well spread 63-bit seed from small integers (SplitMix64's finaliser over each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@HOOKS.register_module()
class Reseed(Hook):
    """Seed torch, numpy and random from (run seed, iteration, rank) before every training iteration.

    Once per epoch is not enough, and neither are saved generator states: a checkpoint is written before validation,
    whose dataloader draws from torch's generator too.
    """

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed = mix(runner.seed, runner.iter, get_rank())
        # Not torch.manual_seed: without a GPU it formats a stack trace per call, for a seeding that never comes.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
