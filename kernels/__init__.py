"""Tensor operations: a PyTorch reference for each, faster kernels where they exist, one dispatcher."""

from .dispatch import use
from .pool_mixer import pool_mixer

__all__ = ['pool_mixer', 'use']
