"""Tensor operations: a PyTorch reference for each, faster kernels where they exist, one dispatcher."""

from .average_pool import average_pool
from .binary_linear import binary_linear
from .bits import pack_bits, popcount, unpack_bits, unpack_signs
from .block_sparse import block_sparse_attention
from .dispatch import Choice, explain, record_choices, use
from .global_filter import global_filter, resample_filter
from .hamming_attention import hamming_attention, hashed_attention
from .hilo import hilo_attention
from .linear_attention import relu_linear_attention
from .long_convolution import long_convolution
from .neighborhood import neighborhood_attention
from .nms import apart, suppress, suppress_by_products
from .onednn import conv2d, linear
from .pool_mixer import pool_mixer
from .shift_linear import fixed_point, pack_shift_sums, pack_shifts, shift_linear, unpack_shifts
from .sparse_window import sparse_window_attention
from .tiles import run_tiles
from .token_fusion import Fusion, fuse_by_scores, fusion_scores
from .token_merge import Matching, match_every_kth, match_tokens, merge_source, token_merge, token_unmerge
from .token_places import falling, mean_to_places, sum_to_places, take_places
from .window_attention import window_attention, window_mask
from .windows import Sets, Windows, build_windows, rotated_sets

__all__ = [
    'Choice',
    'Fusion',
    'Matching',
    'Sets',
    'Windows',
    'apart',
    'average_pool',
    'binary_linear',
    'block_sparse_attention',
    'build_windows',
    'conv2d',
    'explain',
    'falling',
    'fixed_point',
    'fuse_by_scores',
    'fusion_scores',
    'global_filter',
    'hamming_attention',
    'hashed_attention',
    'hilo_attention',
    'linear',
    'long_convolution',
    'match_every_kth',
    'match_tokens',
    'mean_to_places',
    'merge_source',
    'neighborhood_attention',
    'pack_bits',
    'pack_shift_sums',
    'pack_shifts',
    'pool_mixer',
    'popcount',
    'record_choices',
    'relu_linear_attention',
    'resample_filter',
    'rotated_sets',
    'run_tiles',
    'shift_linear',
    'sparse_window_attention',
    'sum_to_places',
    'suppress',
    'suppress_by_products',
    'take_places',
    'token_merge',
    'token_unmerge',
    'unpack_bits',
    'unpack_shifts',
    'unpack_signs',
    'use',
    'window_attention',
    'window_mask',
]
