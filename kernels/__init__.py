"""Tensor operations: a PyTorch reference for each, faster kernels where they exist, one dispatcher."""

from .dispatch import use
from .global_filter import global_filter, resample_filter
from .hilo import hilo_attention
from .linear_attention import relu_linear_attention
from .long_convolution import long_convolution
from .nms import apart, suppress, suppress_by_products
from .pool_mixer import pool_mixer
from .window_attention import window_attention

__all__ = [
    'apart',
    'global_filter',
    'hilo_attention',
    'long_convolution',
    'pool_mixer',
    'relu_linear_attention',
    'resample_filter',
    'suppress',
    'suppress_by_products',
    'use',
    'window_attention',
]
