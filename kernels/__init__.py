"""Tensor operations: a PyTorch reference for each, faster kernels where they exist, one dispatcher."""

from .dispatch import Choice, explain, record_choices, use
from .global_filter import global_filter, resample_filter
from .hilo import hilo_attention
from .linear_attention import relu_linear_attention
from .long_convolution import long_convolution
from .pool_mixer import pool_mixer
from .sparse_window import sparse_window_attention
from .window_attention import window_attention
from .windows import Sets, Windows, build_windows, rotated_sets

__all__ = [
    'Choice',
    'Sets',
    'Windows',
    'build_windows',
    'explain',
    'global_filter',
    'hilo_attention',
    'long_convolution',
    'pool_mixer',
    'record_choices',
    'relu_linear_attention',
    'resample_filter',
    'rotated_sets',
    'sparse_window_attention',
    'use',
    'window_attention',
]
