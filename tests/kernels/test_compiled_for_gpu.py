"""Without this a kernel could run in the interpreter and be refused by the compiler: types of loop variables, shapes
that are not powers of two, more shared memory than a GPU has. No GPU is needed: operations get fake tensors, and the
kernels they launch are compiled to machine code.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip('triton')
from gpu_compiler import compile_for, launches

from densezoo.kernels import (
    Windows,
    binary_linear,
    block_sparse_attention,
    hamming_attention,
    hilo_attention,
    match_tokens,
    mean_to_places,
    neighborhood_attention,
    pool_mixer,
    shift_linear,
    sparse_window_attention,
    window_attention,
)

MOST_SHARED = 101376  # bytes a block can have on compute capability 8.6, the least of those from 8.0


def window(dtype, window=7, width=32, heads=3, **extra):
    C, N = heads * width, window * window
    qkv = torch.empty(2, 20, 30, 3 * C, dtype=dtype, requires_grad=True)
    given = {'bias': torch.empty(heads, N, N), 'outside': torch.empty(3 * C), 'cosine': torch.empty(heads)}
    return window_attention(qkv, window, 1, heads=heads, **given, backend='triton')


def sparse(dtype):
    q = torch.empty(50, 2, 32, dtype=dtype, requires_grad=True)
    index = torch.empty(60, dtype=torch.int64)
    windows = Windows(torch.empty(5, dtype=torch.int64), index, index, index, 40)
    return sparse_window_attention(q, q, q, windows, bias=None, backend='triton')


def blocks(dtype):
    q = torch.empty(1, 2, 200, 32, dtype=dtype, requires_grad=True)
    return block_sparse_attention(q, q, q, torch.empty(4, 4, dtype=torch.bool), backend='triton')


def neighborhood(dtype):
    qkv = torch.empty(1, 20, 30, 192, dtype=dtype, requires_grad=True)
    return neighborhood_attention(qkv, 7, heads=2, bias=torch.empty(2, 13, 13), backend='triton')


def pooling(dtype):
    x = torch.empty(2, 9, 9, 48, dtype=dtype, requires_grad=True)
    return pool_mixer(x, norm=(torch.ones(48, requires_grad=True), None, 1e-5), backend='triton')


def hilo(dtype):
    qkv = torch.empty(1, 8, 8, 96, dtype=dtype, requires_grad=True)
    query = torch.empty(1, 8, 8, 64, dtype=dtype, requires_grad=True)
    key_value = torch.empty(1, 4, 4, 128, dtype=dtype)
    return torch.cat(hilo_attention(qkv, query, key_value, 2, heads=(1, 2), backend='triton'), 3)


def matching(dtype):
    return match_tokens(torch.empty(2, 50, 64, dtype=dtype), 5, class_token=True, backend='triton').stay


def merging(dtype):
    x = torch.empty(2, 50, 192, dtype=dtype, requires_grad=True)
    place, kept, moved = (torch.empty(2, rows, dtype=torch.int64) for rows in (50, 41, 9))
    return mean_to_places(x, torch.empty(2, 50, 1), place, kept, moved, backend='triton')


def signs(dtype):
    vector = torch.empty(48)
    words = torch.empty(48, 3, dtype=torch.int32)
    x = torch.empty(2, 50, 70, dtype=dtype)
    return binary_linear(x, words, vector, vector, nonzero=words, backend='triton')


def unpacked(dtype):
    words = torch.empty(48, 3, dtype=torch.int32)
    return binary_linear(torch.empty(50, 70, dtype=dtype), words, input_signs=False, backend='triton')


def shifts(dtype):
    words = torch.empty(48, 12, dtype=torch.int32)
    return shift_linear(torch.empty(50, 70, dtype=dtype), words, torch.empty(48), backend='triton')


def shift_sums(dtype):
    words = torch.empty(48, 12, dtype=torch.int32)
    return shift_linear(torch.empty(50, 70, dtype=dtype), words, terms=2, backend='triton')


def hamming(dtype):
    q = torch.empty(2, 3, 49, 32, dtype=dtype)
    return hamming_attention(q, q, q, bias=torch.empty(3, 49, 49), backend='triton')


# operation -> (modules that launch, kernels of a forward and a backward pass)
OPERATIONS = {
    window: (('triton_window',), 2),
    sparse: (('triton_ragged',), 3),
    blocks: (('triton_ragged',), 3),
    neighborhood: (('triton_neighborhood',), 3),
    pooling: (('triton_pool',), 3),
    hilo: (('triton_window', 'triton_ragged'), 5),
    matching: (('triton_match',), 1),
    merging: (('triton_merge',), 2),
    signs: (('triton_binary',), 2),
    unpacked: (('triton_binary',), 1),
    shifts: (('triton_shift',), 1),
    shift_sums: (('triton_shift',), 1),
    hamming: (('triton_hamming',), 1),
}
INFERENCE = (matching, signs, unpacked, shifts, shift_sums, hamming)  # without a gradient


@pytest.mark.parametrize('operation', OPERATIONS)
def test_traced_on_a_gpu(operation):
    """The operator itself on fake tensors: shapes and types, as torch.compile sees it."""
    with FakeTensorMode(), torch.device('cuda'):
        out = operation(torch.float16)
    assert out.device.type == 'cuda' and (out.dtype == torch.float16 or operation is matching)
    assert out.requires_grad or operation in INFERENCE


def compiled(operation, dtype, monkeypatch, **options):
    def call():
        out = operation(dtype, **options)
        if out.requires_grad:
            out.sum().backward()

    found = launches(call, monkeypatch, OPERATIONS[operation][0])
    for kernel, arguments, constants in found:
        program = compile_for(86, kernel, arguments, constants)
        assert program.asm['cubin'] and program.metadata.shared <= MOST_SHARED, kernel
    return found


@pytest.mark.parametrize('operation', [matching, merging, pooling, signs])
def test_machine_code_of_small_kernels(operation, monkeypatch):
    assert len(compiled(operation, torch.float16, monkeypatch)) == OPERATIONS[operation][1]


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('operation', OPERATIONS)
def test_machine_code(operation, dtype, monkeypatch):
    assert len(compiled(operation, dtype, monkeypatch)) == OPERATIONS[operation][1]


@pytest.mark.slow
@pytest.mark.parametrize(('side', 'width', 'kernels'), [(12, 32, 4), (7, 128, 4), (4, 64, 2), (32, 16, 4)])
def test_machine_code_of_windows(side, width, kernels, monkeypatch):
    assert len(compiled(window, torch.float16, monkeypatch, window=side, width=width)) == kernels
