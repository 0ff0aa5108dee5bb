"""Tensor operations: a PyTorch reference for each, faster kernels where they exist, one dispatcher."""

from .block_sparse import block_sparse_attention
from .dispatch import Choice, explain, record_choices, use
from .global_filter import global_filter, resample_filter
from .hilo import hilo_attention
from .linear_attention import relu_linear_attention
from .long_convolution import long_convolution
from .neighborhood import neighborhood_attention
from .nms import apart, suppress, suppress_by_products
from .pool_mixer import pool_mixer
from .sparse_window import sparse_window_attention
from .token_fusion import Fusion, fuse_by_scores, fusion_scores
from .token_merge import Matching, match_every_kth, match_tokens, merge_source, token_merge, token_unmerge
from .token_places import falling, mean_to_places, sum_to_places, take_places
from .window_attention import window_attention
from .windows import Sets, Windows, build_windows, rotated_sets

__all__ = [
    'Choice',
    'Fusion',
    'Matching',
    'Sets',
    'Windows',
    'apart',
    'block_sparse_attention',
    'build_windows',
    'explain',
    'falling',
    'fuse_by_scores',
    'fusion_scores',
    'global_filter',
    'hilo_attention',
    'long_convolution',
    'match_every_kth',
    'match_tokens',
    'mean_to_places',
    'merge_source',
    'neighborhood_attention',
    'pool_mixer',
    'record_choices',
    'relu_linear_attention',
    'resample_filter',
    'rotated_sets',
    'sparse_window_attention',
    'sum_to_places',
    'suppress',
    'suppress_by_products',
    'take_places',
    'token_merge',
    'token_unmerge',
    'use',
    'window_attention',
]
