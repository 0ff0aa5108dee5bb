"""Compiles Triton kernels for a GPU on a machine without one: the launches of an operation on fake tensors.

What the interpreter takes the compiler may refuse (types of loop variables, shapes that are not powers of two, shared
memory): this is the other half of the proof that a kernel runs on a GPU.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_NAMES = {
    torch.float32: '*fp32',
    torch.float16: '*fp16',
    torch.bfloat16: '*bf16',
    torch.int32: '*i32',
    torch.int64: '*i64',
    torch.bool: '*i1',
}


def launches(call: Callable[[], Any], monkeypatch: Any, modules: tuple[str, ...]) -> list[tuple[Any, tuple, dict]]:
    """(kernel, arguments, constants) of every launch that `call` makes on fake tensors.

    They are on the CPU, where gradients need no driver; the dispatcher takes them as it does for the interpreter.
    """
    found: list[tuple[Any, tuple, dict]] = []

    def note(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        found.append((kernel, arguments, constants))

    for name in modules:
        importlib.import_module(f'densezoo.kernels.{name}')
        monkeypatch.setattr(sys.modules[f'densezoo.kernels.{name}'], 'launch', note)
    monkeypatch.setattr('densezoo.kernels.dispatch.interpreting', lambda: True)
    with FakeTensorMode():
        call()
    return found


def compile_for(capability: int, kernel: Any, arguments: tuple, constants: dict) -> Any:
    """The kernel's program for an NVIDIA GPU; its `metadata.shared` is the shared memory in bytes."""
    signature, fixed = {}, {}
    options = {name: constants[name] for name in ('num_warps', 'num_stages') if name in constants}
    given = dict(zip(kernel.arg_names, arguments)) | {k: v for k, v in constants.items() if k not in options}
    for name in kernel.arg_names:
        value = given[name]
        if name in constants or value is None:
            signature[name], fixed[name] = 'constexpr', value
        elif isinstance(value, torch.Tensor):
            signature[name] = _NAMES[value.dtype]
        else:
            signature[name] = 'fp32' if isinstance(value, float) else 'i32'
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in fixed.items()})
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
