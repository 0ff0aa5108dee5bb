"""What all Triton kernels share on the host's side: launching them, eagerly or traced, and their constants.

Imported by the files of kernels alone, which are imported when Triton is really used.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import wrap_triton

from .dispatch import interpreting

try:
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:  # pragma: no cover
    InterpretedFunction = None

# the interpreter keeps bfloat16 as integers, and multiplies those
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


def launch(kernel: Any, grid: Sequence[Any], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on a grid; traced, it becomes a node of the graph.

    Interpreted kernels cannot be traced: for fake tensors, which have no values, they have nothing to do.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if 0 in grid:
        return
    if InterpretedFunction is not None and isinstance(kernel, InterpretedFunction):
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            kernel[tuple(grid)](*arguments, **constants)
    elif torch.compiler.is_compiling() or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        wrap_triton(kernel)[tuple(grid)](*arguments, **constants)
    else:
        with torch.cuda.device_of(tensors[0]):  # a launch goes to the current device
            wrap_triton(kernel)[tuple(grid)](*arguments, **constants)


def precision(tensor: Tensor) -> str:
    """How products of float32 are computed: exactly, unless PyTorch's own may use TF32."""
    if tensor.dtype == torch.float32 and torch.get_float32_matmul_precision() == 'highest':
        return 'ieee'
    return 'tf32'


def block(size: int, most: int = 64) -> int:
    """A power of two from 16 (the least for tensor cores) to `most` that holds `size`, or divides it into blocks."""
    return min(max(triton.next_power_of_2(size), 16), most)


def block_within(size: int, width: int, tensor: Tensor) -> int:
    """As `block`, but small enough that the blocks of a backward pass fit into 100 KB of shared memory."""
    return block(size, min(max(8192 // (block(width, 128) * tensor.element_size()), 16), 64))


def unit_stride(x: Tensor) -> Tensor:
    """x, copied only if its last axis is not dense: the kernels take any other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
